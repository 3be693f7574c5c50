"""Guess, verify, commit: several tokens of a sequence for one step of the model.

A step runs the last token and the guesses after it, and gives logits for each. From them tokens are
chosen as ever, with the penalties and the random number of their position; as long as the chosen
token is the guessed one, the next row is right too. So the text is the one that would have come
without guesses. What the wrong ones left is written over: the sequence is rewound.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..backend import Array
from ..runner import Runner
from ..sampler import Row, Sampler, pick
from .drafter import Ask, Drafter
from .policy import Policy

Guide = Callable[[Sequence[int]], tuple[list[int], NDArray[np.int32]]]


@dataclass(frozen=True)
class Turn:
    """A sequence that is to go on: its text, the last token of which the model has not seen."""

    slot: int
    text: Sequence[int]
    sampler: Sampler
    most: int  # tokens that may still come
    logprobs: bool = False
    guide: Guide | None = None  # a grammar: guesses -> those it allows, and its masks


@dataclass(frozen=True)
class Round:
    """What came of a turn: tokens, at least one, which its sampler has not counted."""

    tokens: list[int]
    guessed: int
    logits: NDArray[np.float32] | None = None  # (n, V), the rows they were chosen from, if wanted


class Speculator:
    """A drafter and a policy on a runner. `guessed` and `accepted` count tokens."""

    def __init__(self, runner: Runner, drafter: Drafter, policy: Policy | None = None) -> None:
        self.runner, self.drafter = runner, drafter
        self.policy = policy or Policy(drafter.longest)
        self.guessed = self.accepted = 0
        runner.attach(drafter)

    def round(self, turns: Sequence[Turn]) -> list[Round]:
        """One step for all of them."""
        start = time.perf_counter()
        guesses = self._guess(turns, self.policy.length(len(turns)))
        drafted = time.perf_counter()
        rounds = self._verify(turns, guesses)
        ended = time.perf_counter()
        guessed, right = [r.guessed for r in rounds], [len(r.tokens) - 1 for r in rounds]
        self.policy.learn(guessed, right, drafted - start, ended - drafted)
        self.guessed += sum(guessed)
        self.accepted += sum(right)
        return rounds

    def _guess(self, turns: Sequence[Turn], count: int) -> list[list[int]]:
        asks = [
            Ask(turn.slot, turn.text, min(count, turn.most - 1), turn.sampler) for turn in turns
        ]
        if not any(ask.count for ask in asks):
            return [[] for _ in turns]
        return self.drafter.propose(asks)

    def _verify(self, turns: Sequence[Turn], guesses: Sequence[list[int]]) -> list[Round]:
        be, runner = self.runner.be, self.runner
        guesses, masks = self._guided(turns, guesses)
        widths = self._widths(turns, guesses)
        each = list(zip(turns, guesses, widths, strict=True))
        chunks: dict[int, Sequence[int]] = {
            turn.slot: [turn.text[-1], *guess] + [0] * (width - 1 - len(guess))
            for turn, guess, width in each
        }
        logits = runner.run(chunks, pad_to=sum(widths), every_row=True)
        rows: list[Row | None] = []
        for turn, guess, width in each:
            rows += [
                (turn.sampler.after(guess[:row]), len(turn.text) + row)
                for row in range(len(guess) + 1)
            ]
            rows += [None] * (width - 1 - len(guess))
        chosen = be.download(pick(be, logits, rows, _masks(masks, widths))).tolist()
        rounds, first = [], 0
        for turn, guess, width in each:
            mine = chosen[first : first + len(guess) + 1]
            right = next((n for n, token in enumerate(guess) if token != mine[n]), len(guess))
            runner.rewind(turn.slot, len(turn.text) + right)
            seen = self._rows(logits, first, right + 1) if turn.logprobs else None
            rounds.append(Round(mine[: right + 1], len(guess), seen))
            first += width
        return rounds

    def _widths(self, turns: Sequence[Turn], guesses: Sequence[list[int]]) -> list[int]:
        """Rows of each sequence. Where a backend records steps they are all alike: few shapes."""
        if not getattr(self.runner.be, "decode_sizes", ()):
            return [len(guess) + 1 for guess in guesses]
        widest = max(map(len, guesses)) + 1
        return [min(widest, self.runner.context + 1 - len(turn.text)) for turn in turns]

    def _guided(
        self, turns: Sequence[Turn], guesses: Sequence[list[int]]
    ) -> tuple[list[list[int]], list[NDArray[np.int32] | None]]:
        """The guesses that grammars allow, and for each row what they allow then."""
        cut, masks = list(guesses), list[NDArray[np.int32] | None]([None] * len(turns))
        for number, turn in enumerate(turns):
            if turn.guide:
                cut[number], masks[number] = turn.guide(guesses[number])
        return cut, masks

    def _rows(self, logits: Array, first: int, count: int) -> NDArray[Any]:
        be, rows = self.runner.be, np.arange(first, first + count, dtype=np.int32)
        return be.download(be.take(logits, be.upload(rows)))


def _masks(
    masks: Sequence[NDArray[np.int32] | None], widths: Sequence[int]
) -> NDArray[np.int32] | None:
    """A mask for each row, (R, W); those without a grammar's allow everything."""
    words = next((bits.shape[1] for bits in masks if bits is not None), None)
    if words is None:
        return None
    every = np.full((sum(widths), words), -1, np.int32)
    first = 0
    for bits, width in zip(masks, widths, strict=True):
        if bits is not None:
            every[first : first + len(bits)] = bits
        first += width
    return every
