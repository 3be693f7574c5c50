"""Guess, verify, commit: several tokens of a sequence for one step of the model.

A step runs the last token and the guesses after it, and gives logits for each. From them tokens are
chosen; as long as the chosen token is the guessed one, the next row is right too. What the wrong
ones left is written over: the sequence is rewound.

Tokens are chosen as ever, with the penalties and the random number of their position: then the
text is the one that would have come without guesses. Where no seed was given, nobody could tell
this text from another one of the same distribution: there guesses that were drawn from a
distribution are taken by rejection, which finds more of them right.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from operator import is_
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..backend import Array
from ..runner import Runner
from ..sampler import Purpose, Row, Sampler, pick, uniform, weighed
from ..step import span
from .drafter import Ask, Draft, Drafter
from .misses import Misses
from .policy import Policy, Record

_NUMBERS: tuple[Purpose, ...] = "accept", "choose"
Guide = Callable[[Sequence[int]], tuple[list[int], NDArray[np.int32]]]


@dataclass(frozen=True)
class Turn:
    """A sequence that is to go on: its text, the last token of which the model has not seen."""

    slot: int
    text: Sequence[int]
    sampler: Sampler
    most: int  # tokens that may still come
    record: Record  # of its guesses: the policy's `record()` when it began
    logprobs: bool = False
    guide: Guide | None = None  # a grammar: guesses -> those it allows, and its masks

    @property
    def by_rejection(self) -> bool:
        """Whether guesses may be taken by rejection, which gives another text than the seed's.

        A grammar cuts guesses by what they are. That changes what rejection draws.
        """
        params = self.sampler.params
        return params.seed is None and params.temperature > 0 and self.guide is None


@dataclass(frozen=True)
class Round:
    """What came of a turn: tokens, at least one, which its sampler has not counted."""

    tokens: list[int]
    guessed: int
    logits: NDArray[np.float32] | None = None  # (n, V), the rows they were chosen from, if wanted


@dataclass
class Tally:
    """Since the start. `accepted_at[n]` are guesses at place n that were right."""

    drafts: int = 0  # sequences times rounds with guesses
    drafted_tokens: int = 0
    accepted_tokens: int = 0
    accepted_at: list[int] = field(default_factory=list)
    paused: int = 0  # sequences of the last round or step that might have guessed and did not

    def count(self, guessed: int, right: int) -> None:
        self.drafts += guessed > 0
        self.drafted_tokens += guessed
        self.accepted_tokens += right
        for place in range(right):
            if place == len(self.accepted_at):
                self.accepted_at.append(0)
            self.accepted_at[place] += 1


class Speculator:
    """A drafter and a policy on a runner."""

    def __init__(self, runner: Runner, drafter: Drafter, policy: Policy | None = None) -> None:
        self.runner, self.drafter = runner, drafter
        sizes = getattr(runner.be, "decode_sizes", ())
        self.alike = bool(sizes)  # few shapes: steps are recorded
        placement = getattr(runner.be, "placement", None)
        # longer steps are taken for prompts, which bring every expert from host memory
        self._longest = sizes[-1] if sizes and placement is not None else None
        misses = None if placement is None else Misses(placement, runner.cfg)
        self.policy = policy or Policy(drafter.longest, self.alike, misses)
        self.tally = Tally()
        self._unlearned: Callable[[], None] | None = None  # what came of the last round
        self._ended = 0.0
        self._next: tuple[list[Record], int, list[int]] | None = None  # lengths that are known
        runner.attach(drafter)

    def lengths(self, turns: Sequence[Turn]) -> list[int]:
        """How many tokens each should guess now."""
        records, room = [turn.record for turn in turns], self._room(turns)
        counts = self._foreseen(records, _span(turns))
        if counts is None:
            self._learn(turns)
            counts = self.policy.lengths(records, room)
        counts = [min(count, most) for count, most in zip(counts, room, strict=True)]
        self.tally.paused = sum(count == 0 < most for count, most in zip(counts, room, strict=True))
        return counts

    def round(self, turns: Sequence[Turn], asked: Sequence[int] | None = None) -> list[Round]:
        """One step for all of them. `asked` is what `lengths` said, if it was asked before."""
        asked = self.lengths(turns) if asked is None else asked
        start = self._ended if self._next else time.perf_counter()  # what lies between counts
        draft = self._guess(turns, asked)
        if draft.sure:
            draft = draft.cut(self.policy.kept(asked, draft.sure))
        drafted = time.perf_counter()
        rounds = self._verify(turns, draft)
        self._ended = ended = time.perf_counter()
        guessed, right = [r.guessed for r in rounds], [len(r.tokens) - 1 for r in rounds]
        records = [turn.record for turn in turns]

        def learn() -> None:
            if draft.sure:
                self.policy.learn_sure(records, draft.sure, guessed, right)
            self.policy.learn(records, asked, guessed, right, drafted - start, ended - drafted)

        self._unlearned = learn
        for each in zip(guessed, right, strict=True):
            self.tally.count(*each)
        return rounds

    def stepped(self, turns: Sequence[Turn], seconds: float) -> None:
        """A plain step of these took so long: what guessing has to beat."""
        self._learn(turns)
        none = [0] * len(turns)
        self.policy.learn([turn.record for turn in turns], none, none, none, 0.0, seconds)

    def _learn(self, turns: Sequence[Turn]) -> None:
        """What came of the last round; then it is about these."""
        learn, self._unlearned, self._next = self._unlearned, None, None
        if learn is not None:
            learn()
        self.policy.costs.span = _span(turns)

    def _think(self, turns: Sequence[Turn]) -> None:
        """While the device works on a round: of the one before it, and of the next one."""
        self._learn(turns)
        records, room = [turn.record for turn in turns], self._room(turns)
        counts = self.policy.foresee(records, room)
        if counts is not None:
            self._next = records, self.policy.costs.span, counts

    def _room(self, turns: Sequence[Turn]) -> list[int]:
        """How many tokens each may guess."""
        room = [turn.most - 1 for turn in turns]
        if self._longest is None:
            return room
        most = max(0, self._longest // len(turns) - 1)
        return [min(count, most) for count in room]

    def _foreseen(self, records: Sequence[Record], span: int) -> list[int] | None:
        """Lengths that were thought of during the round before, if it was of the same sequences."""
        before, at, counts = self._next or ([], 0, [])
        same = len(before) == len(records) and all(map(is_, before, records))
        return counts if same and at == span else None

    def _guess(self, turns: Sequence[Turn], counts: Sequence[int]) -> Draft:
        """Guesses of those that should make some; none of the others."""
        asks = [
            Ask(turn.slot, turn.text, count, turn.sampler, turn.by_rejection)
            for turn, count in zip(turns, counts, strict=True)
        ]
        return self.drafter.propose(asks) if any(counts) else Draft([[] for _ in turns])

    def _verify(self, turns: Sequence[Turn], draft: Draft) -> list[Round]:
        be, runner = self.runner.be, self.runner
        guesses, masks = self._guided(turns, draft.guesses)
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
        picked = pick(be, logits, rows, _masks(masks, widths))
        self._think(turns)
        chosen = np.array(be.download(picked))
        if draft.chances:
            self._settle(each, draft.chances, logits, rows, chosen)
        rounds, first = [], 0
        for turn, guess, width in each:
            mine = chosen[first : first + len(guess) + 1].tolist()
            right = next((n for n, token in enumerate(guess) if token != mine[n]), len(guess))
            runner.rewind(turn.slot, len(turn.text) + right)
            seen = self._rows(logits, first, right + 1) if turn.logprobs else None
            rounds.append(Round(mine[: right + 1], len(guess), seen))
            first += width
        return rounds

    def _settle(
        self,
        each: Sequence[tuple[Turn, list[int], int]],
        chances: Sequence[Array],
        logits: Array,
        rows: Sequence[Row | None],
        chosen: NDArray[Any],
    ) -> None:
        """Choose anew, by rejection, in rows of turns whose guesses were drawn for that."""
        be: Any = self.runner.be
        at, drawn_from, tokens, first = list[int](), list[int](), list[int](), 0
        for number, (turn, guess, width) in enumerate(each):
            if turn.by_rejection and guess:
                places = [*range(len(guess)), 0]  # the last row has no guess, so any place will do
                at += range(first, first + len(places))
                drawn_from += [place * len(each) + number for place in places]
                tokens += [*guess, -1]
            first += width
        if not at:
            return
        mine = [row for row in (rows[row] for row in at) if row is not None]
        accept, draw = (
            np.array([uniform(sampler.seed, position, what) for sampler, position in mine], "f4")
            for what in _NUMBERS
        )
        p = be.chances(*weighed(be, be.take(logits, _put(be, at)), mine))
        q = be.gather(chances, _put(be, drawn_from))
        settled = be.settle(p, q, _put(be, tokens), be.upload(accept), be.upload(draw))
        chosen[at] = be.download(settled)

    def _widths(self, turns: Sequence[Turn], guesses: Sequence[list[int]]) -> list[int]:
        """Rows of each sequence. Where a backend records steps they are all alike: few shapes."""
        if not self.alike:
            return [len(guess) + 1 for guess in guesses]
        widest = max(map(len, guesses)) + 1
        return [min(widest, self.runner.context + 1 - len(turn.text)) for turn in turns]

    def _guided(
        self, turns: Sequence[Turn], guesses: Sequence[list[int]]
    ) -> tuple[list[list[int]], list[NDArray[np.int32] | None]]:
        """The guesses that grammars allow, and for each row what they allow then."""
        cut = list(guesses)
        masks: list[NDArray[np.int32] | None] = [None] * len(turns)
        for number, turn in enumerate(turns):
            if turn.guide:
                cut[number], masks[number] = turn.guide(guesses[number])
        return cut, masks

    def _rows(self, logits: Array, first: int, count: int) -> NDArray[Any]:
        be, rows = self.runner.be, np.arange(first, first + count, dtype=np.int32)
        return be.download(be.take(logits, be.upload(rows)))


def _span(turns: Sequence[Turn]) -> int:
    return span(max((len(turn.text) for turn in turns), default=0))


def _put(be: Any, numbers: Sequence[int]) -> Array:
    return be.upload(np.array(numbers, np.int32))


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
