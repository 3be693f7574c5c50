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
from ..sampler import Sampler, pick
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
        guesses, allowed = self._guided(turns, guesses)
        chunks: dict[int, Sequence[int]] = {
            turn.slot: [turn.text[-1], *guess] for turn, guess in zip(turns, guesses, strict=True)
        }
        total = sum(map(len, chunks.values()))
        logits = runner.run(chunks, pad_to=total, every_row=True)
        rows = [
            (turn.sampler.after(guess[:row]), len(turn.text) + row)
            for turn, guess in zip(turns, guesses, strict=True)
            for row in range(len(guess) + 1)
        ]
        chosen = be.download(pick(be, logits, rows, allowed)).tolist()
        rounds, first = [], 0
        for turn, guess in zip(turns, guesses, strict=True):
            mine = chosen[first : first + len(guess) + 1]
            right = next((n for n, token in enumerate(guess) if token != mine[n]), len(guess))
            runner.rewind(turn.slot, len(turn.text) + right)
            seen = self._rows(logits, first, right + 1) if turn.logprobs else None
            rounds.append(Round(mine[: right + 1], len(guess), seen))
            first += len(guess) + 1
        return rounds

    def _guided(
        self, turns: Sequence[Turn], guesses: Sequence[list[int]]
    ) -> tuple[list[list[int]], NDArray[np.int32] | None]:
        """The guesses that grammars allow; if there are grammars, a mask for each row."""
        if not any(turn.guide for turn in turns):
            return list(guesses), None
        words = -(-self.runner.cfg.vocab_size // 32)
        cut: list[list[int]] = []
        masks = []
        for turn, guess in zip(turns, guesses, strict=True):
            free = guess, np.full((len(guess) + 1, words), -1, np.int32)
            few, bits = turn.guide(guess) if turn.guide else free
            cut.append(few)
            masks.append(bits)
        return cut, np.concatenate(masks)

    def _rows(self, logits: Array, first: int, count: int) -> NDArray[Any]:
        be = self.runner.be
        return be.download(
            be.take(logits, be.upload(np.arange(first, first + count, dtype=np.int32)))
        )
