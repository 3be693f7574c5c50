"""One step of work: which tokens, of which sequences, at which positions.

Everything that changes between two steps is in these small integer arrays, so that a backend can
record a step once and replay it with new contents. Prefill, decode, chunks, batches and padding are
the same thing here: rows with a slot and a position.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

SMALLEST_SPAN = 256


class Chunk(NamedTuple):
    """Consecutive tokens of one sequence, from position `start`."""

    slot: int
    start: int
    tokens: Sequence[int]


@dataclass(frozen=True)
class Step:
    tokens: Any  # (T,) ids
    slot: Any  # (T,) which sequence's cache
    pos: Any  # (T,) absolute position, -1 for padding
    emit: dict[int, Any]  # ratio -> (E, 2): slot and block that this step completes, block -1: none
    last: Any  # (R,) rows whose logits are wanted
    span: int  # no position of this step is beyond it: a static bound on the visible entries
    before: Any = None  # (T,) the positions before these, -1 for none: where a drafter watches
    near: "Step | None" = None  # of long chunks, the rows that a drafter watches; None: all
    draws: Any = None  # float32, how a drafter's guesses are drawn (draft/drafter.py); None: not

    def on(self, be: Any) -> "Step":
        """The same step with its arrays on a backend's device."""
        up = be.upload
        return replace(
            self,
            tokens=up(self.tokens),
            slot=up(self.slot),
            pos=up(self.pos),
            emit={ratio: up(blocks) for ratio, blocks in self.emit.items()},
            last=up(self.last),
            before=None if self.before is None else up(self.before),
            near=None if self.near is None else self.near.on(be),
            draws=None if self.draws is None else up(self.draws),
        )


def watched(step: Step, near: int) -> Step:
    """The same host Step for a drafter, which watches the last `near` rows of each sequence.

    In `near`, `last` says which rows of the whole step these are.
    """
    before = np.maximum(step.pos - 1, -1)
    real = np.flatnonzero(step.pos >= 0).astype(np.int32)
    newest = dict(zip(step.slot[real].tolist(), step.pos[real].tolist(), strict=True))
    oldest = np.array([newest[slot] - near for slot in step.slot[real].tolist()])
    rows = real[step.pos[real] > oldest]
    if len(rows) == len(real):
        return replace(step, before=before)
    few = Step(
        step.tokens[rows], step.slot[rows], step.pos[rows], {}, rows, step.span, before[rows]
    )
    return replace(step, before=before, near=few)


def plan(
    chunks: Sequence[Chunk],
    ratios: Iterable[int],
    pad_to: int = 0,
    every_row: bool = False,
) -> Step:
    """A host Step for chunks of different sequences, padded to at least `pad_to` tokens.

    Logits are wanted for the last token of each chunk, or for all rows with `every_row`. With
    `pad_to` the blocks are padded too, to a number that depends on the chunks' lengths only,
    or for a single chunk on `pad_to`: then shapes repeat.
    """
    tokens: list[int] = []
    slot: list[int] = []
    pos: list[int] = []
    last: list[int] = []
    emit: dict[int, list[tuple[int, int]]] = {ratio: [] for ratio in ratios}
    for chunk in chunks:
        end = chunk.start + len(chunk.tokens)
        first_row = len(tokens)
        tokens += chunk.tokens
        slot += [chunk.slot] * len(chunk.tokens)
        pos += range(chunk.start, end)
        last += range(first_row if every_row else len(tokens) - 1, len(tokens))
        for ratio, blocks in emit.items():
            done = [(chunk.slot, block) for block in range(chunk.start // ratio, end // ratio)]
            size = max(len(chunk.tokens), pad_to if len(chunks) == 1 else 0)
            most = -(-size // ratio) if pad_to else 0
            blocks += done + [(chunk.slot, -1)] * (most - len(done))
    padding = max(0, pad_to - len(tokens))
    if every_row:
        last += range(len(tokens), len(tokens) + padding)
    return Step(
        _int32(tokens + [0] * padding),
        _int32(slot + [0] * padding),
        _int32(pos + [-1] * padding),
        {ratio: _int32(blocks).reshape(-1, 2) for ratio, blocks in emit.items()},
        _int32(last),
        span(max(pos, default=0) + 1),
    )


def plan_decode(
    tokens: Any, slots: Sequence[int], positions: Sequence[int], ratios: Iterable[int], size: int
) -> Step:
    """A Step of one token for each slot, padded to `size` in all its arrays but `tokens`.

    `tokens` (size,) may lie on the device; logits are wanted for every row.
    """
    padding = size - len(slots)
    emit = {}
    for ratio in ratios:
        done = [(at + 1) // ratio - 1 if (at + 1) % ratio == 0 else -1 for at in positions]
        blocks = list(zip(slots, done, strict=True)) + [(0, -1)] * padding
        emit[ratio] = _int32(blocks).reshape(-1, 2)
    return Step(
        tokens,
        _int32([*slots] + [0] * padding),
        _int32([*positions] + [-1] * padding),
        emit,
        np.arange(size, dtype=np.int32),
        span(max(positions) + 1),
    )


def span(length: int) -> int:
    """`length` rounded up to a power of two: few different shapes."""
    return max(SMALLEST_SPAN, 1 << (length - 1).bit_length())


def _int32(values: list[Any]) -> NDArray[np.int32]:
    return np.asarray(values, np.int32)
