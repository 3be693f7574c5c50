"""What the launches of a step read, in order, so that each may ask for what the next one needs.

Between two launches of gemv.cu others run that read little. A launch whose weights are on their way
asks the second-level cache for the first bytes of what the next one's blocks of threads will read.
"""

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass

from ..qmatrix import QMatrix

MOST_RANGES = 16
OF_DOWN = 8 << 20
BUDGET = 16 << 20  # bytes: about what memory gives while the kernels in between run


class Range(ctypes.Structure):
    _fields_ = (
        ("start", ctypes.c_uint64),
        *((name, ctypes.c_uint32) for name in ("each", "some")),
        *((name, ctypes.c_int) for name in ("chunks", "pad")),
    )


class Ahead(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_int) for name in ("count", "pad")),
        ("ranges", Range * MOST_RANGES),
    )


@dataclass(frozen=True)
class Part:
    """Of a matrix `rows` rows from `first` on, of which a block of threads takes `each`."""

    matrix: QMatrix
    first: int
    rows: int
    each: int

    def runs(self) -> list[tuple[int, int, int]]:
        """Address, bytes a block takes and count of blocks: of codes, scales and biases."""
        m, chunks = self.matrix, -(-self.rows // self.each)
        groups = m.cols // m.group if m.group else 0
        wide = groups * (2 if m.format == "affine" else 1)
        planes = [(0, m.cols * m.bits // 8)]
        planes += [(m.scales_at, wide)] * bool(groups) + [(m.biases_at, wide)] * bool(m.biases_at)
        return [(m.address + at + self.first * row, self.each * row, chunks) for at, row in planes]


Runs = list[tuple[int, int, int]]


class Order:
    """The launches of a step, as the last one had them."""

    def __init__(self) -> None:
        self._seen: list[Runs] = []
        self._at = 0

    def restart(self) -> None:
        """A step begins."""
        self._at = 0

    def next(self, parts: Sequence[Part]) -> Ahead:
        """For a launch that reads `parts`, as far as that is known beforehand: what to ask for."""
        runs = _joined([run for part in parts for run in part.runs()])
        if self._seen[self._at : self._at + 1] != [runs]:
            self._seen[self._at :] = [runs]
        self._at += 1
        return asked(self._seen[self._at] if self._at < len(self._seen) else [], BUDGET)


def _joined(runs: Runs) -> Runs:
    """Runs that go on where another ends are one."""
    joined: Runs = []
    for start, each, chunks in sorted(runs):
        if joined:
            before, size, count = joined[-1]
            if size == each and before + size * count == start:
                joined[-1] = before, size, count + chunks
                continue
        joined.append((start, each, chunks))
    return joined


def asked(runs: Runs, budget: int) -> Ahead:
    total = sum(each * chunks for _, each, chunks in runs)
    if not total or not budget or len(runs) > MOST_RANGES:
        return Ahead(0)
    share = min(1.0, budget / total)
    ranges = [
        Range(start, each, int(each * share) // 16 * 16, chunks) for start, each, chunks in runs
    ]
    return Ahead(len(runs), 0, (Range * MOST_RANGES)(*ranges))
