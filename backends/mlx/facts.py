"""What a step means, worked out once on the host and shared by its layers.

A step's positions come from the host, so reading them waits for nothing. Known here, they become
slices, exact lengths and a few uploaded constants where device code would need masks: rows that
were never written are then not read at all.
"""

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from ds4.step import Step

Ints = NDArray[np.integer]
FEW = 32  # tokens of a short step


@dataclass(frozen=True)
class Run:
    """Rows `first` to `end` of a step: positions from `start` on, of the sequence in `slot`."""

    first: int
    end: int
    slot: int
    start: int

    @property
    def length(self) -> int:
        return self.end - self.first

    @property
    def stop(self) -> int:
        """One past its last position."""
        return self.start + self.length

    def part(self, first: int, length: int) -> "Run":
        """The rows from `first` on, counted from this run's own, at most `length` of them."""
        end = min(self.first + first + length, self.end)
        return Run(self.first + first, end, self.slot, self.start + first)


class Facts:
    """Of one step: its runs of consecutive positions, and constants by what they depend on.

    With `apart` each token of a short step is a run of its own: its bits are those it has alone.
    """

    def __init__(self, step: Step, apart: bool = False) -> None:
        self.step, self._kept = step, dict[Any, Any]()
        self.pos: Ints = np.array(step.pos)
        self.slot: Ints = np.array(step.slot)
        self.runs = _runs(self.slot, self.pos, apart and len(self.pos) <= FEW)

    def rotation(self, freqs: mx.array, inverse: bool = False) -> mx.array:
        """complex64 (T, rotary / 2): what turns a pair of channels."""
        key = id(freqs), inverse
        if key not in self._kept:
            turn = rotation(self.pos, freqs)
            self._kept[key] = mx.array(np.conj(turn) if inverse else turn), freqs
        return self._kept[key][0]

    def ring_rows(self, size: int) -> Ints:
        """(T,): where a ring keeps each token; padding goes to the scratch row behind it."""
        rows: Ints = np.where(self.pos < 0, size, self.pos % size)
        return rows

    def blocks(self, ratio: int) -> Ints:
        """(E, 2): slot and block of each block that this step completes."""
        key = "blocks", ratio
        if key not in self._kept:
            emit: Ints = np.array(self.step.emit[ratio]).reshape(-1, 2)
            self._kept[key] = emit[emit[:, 1] >= 0]
        return self._kept[key]

    def by_run(
        self,
        of_run: Callable[[Run, slice], mx.array],
        of_padding: Callable[[int], mx.array],
    ) -> mx.array:
        """(T, ...): `of_run(run, its rows)` for each run, `of_padding(n)` for what is in none."""
        parts, at = [], 0
        for run in self.runs:
            if run.first > at:
                parts.append(of_padding(run.first - at))
            parts.append(of_run(run, slice(run.first, run.end)))
            at = run.end
        if at < len(self.pos):
            parts.append(of_padding(len(self.pos) - at))
        return parts[0] if len(parts) == 1 else mx.concatenate(parts)

    def keep(self, key: Any, make: Any) -> Any:
        """`make()`, once for each key of this step."""
        if key not in self._kept:
            self._kept[key] = make()
        return self._kept[key]


def rotation(pos: Ints, freqs: mx.array) -> NDArray[np.complex64]:
    """complex64 (T, rotary / 2), the angles in float32 as in the reference."""
    angle = pos.astype(np.float32)[:, None] * np.array(freqs)
    turn = np.stack([np.cos(angle), np.sin(angle)], -1)
    return np.ascontiguousarray(turn).view(np.complex64)[..., 0]


def rotate(x: mx.array, turn: mx.array) -> mx.array:
    """Turn adjacent pairs of the last channels of (T, ..., C) by (T, rotary / 2)."""
    plain = x.shape[-1] - 2 * turn.shape[-1]
    turn = turn.reshape(len(turn), *[1] * (x.ndim - 2), -1)
    turned = (x[..., plain:].view(mx.complex64) * turn).view(mx.float32)
    return mx.concatenate([x[..., :plain], turned], -1) if plain else turned


def _runs(slot: Ints, pos: Ints, apart: bool) -> list[Run]:
    """Neighbouring rows that continue each other, or each by itself; padding is in none."""
    breaks = (np.diff(slot) != 0) | (np.diff(pos) != 1) | (pos[1:] < 0) | (pos[:-1] < 0) | apart
    edges = [0, *(np.nonzero(breaks)[0] + 1).tolist(), len(pos)]
    return [
        Run(first, end, int(slot[first]), int(pos[first]))
        for first, end in itertools.pairwise(edges)
        if pos[first] >= 0
    ]
