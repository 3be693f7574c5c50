"""Launches gemv_staged.cu: 9 to 32 tokens against dense matrices, with gemv.linears's bits."""

import ctypes
import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from ..nvrtc import Kernel, Module
from ..qmatrix import QMatrix
from .gemv import MOST_TOKENS, Product, parts_of
from .gemv_arguments import MOST_MATRICES, Matrix, format_number, matrix
from .gemv_builds import TILE, block_of, formats

MOST_WAYS = 4
MOST_PAIRS = 128  # sets of rows in a launch whose channels two blocks share
_WARPS, _AHEAD = 16, 1  # as gemv_staged.cu has them
_WHOLE = 72_000  # bytes of a block's x up to which all of it stays in shared memory


class Segment(ctypes.Structure):
    _fields_ = (
        ("matrix", Matrix),
        *((name, ctypes.c_int) for name in ("format", "kept", "halves", "stages")),
        *((name, ctypes.c_int) for name in ("sums_at", "last_at", "sets", "first_block")),
        *((name, ctypes.c_int) for name in ("out_half", "out_stride")),
        *((name, ctypes.c_uint64) for name in ("x", "out", "lower", "done")),
    )


class Segments(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_int) for name in ("count", "tokens")),
        ("each", Segment * MOST_MATRICES),
    )


class Halves:
    """Where two blocks that share rows meet. Of work that runs one launch after the other only."""

    def __init__(self, device: torch.device | str) -> None:
        room = MOST_PAIRS * _rows(MOST_WAYS) * MOST_TOKENS
        self.sums = torch.empty(room, dtype=torch.float32, device=device)
        self.done = torch.zeros(MOST_PAIRS, dtype=torch.int32, device=device)


def linears(products: Sequence[Product], tokens: int, halves: Halves) -> bool:
    """Every product in one launch; False, and nothing done, if gemv.linears has to do it.

    Rows of an output that is float32 lie a multiple of 4 apart.
    """
    width = products[0].x.shape[1]
    cuts = cut([(p.matrix, p.rows) for p in products], width)
    if not cuts:
        return False
    segments, blocks, pairs = Segments(len(products), tokens), 0, 0
    for segment, p, c in zip(segments.each, products, cuts, strict=False):
        step = _rows(c.ways)
        segment.matrix = matrix(p.matrix, p.first_row, p.rows)
        segment.format = format_number(p.matrix)
        segment.kept, segment.halves, segment.stages = c.kept, c.halves, c.stages
        segment.sums_at, segment.last_at, segment.sets = c.sums_at, c.last_at, c.sets
        segment.first_block = blocks
        segment.out_half = int(p.out.dtype == torch.float16)
        segment.out_stride = p.out.shape[1] if segment.out_half else p.out.stride(0)
        segment.x, segment.out = p.x.data_ptr(), p.out.data_ptr()
        segment.lower = halves.sums.data_ptr() + pairs * step * width * 4
        segment.done = halves.done.data_ptr() + pairs * 4
        pairs += -(-p.rows // step)
        blocks += -(-p.rows // (step * c.sets)) * c.halves
    words = options([p.matrix for p in products], width, cuts[0].ways)
    _kernel(words, max(c.shared for c in cuts))((blocks, 1, 1), 32 * _WARPS, segments)
    return True


@dataclass(frozen=True)
class Cut:
    """How a product is cut up: see Segment in gemv_staged.cu."""

    ways: int
    kept: int
    halves: int
    stages: int
    sets: int
    sums_at: int
    last_at: int
    shared: int  # bytes that a block needs


def cut(products: Sequence[tuple[QMatrix, int]], width: int) -> list[Cut]:
    """For rows of matrices and a panel of this width; empty if they do not suit this kernel."""
    alike = len({m.cols for m, _ in products}) == 1
    if width <= TILE or len(products) > MOST_MATRICES or not alike:
        return []
    if not all(_suits(m) for m, _ in products):
        return []
    sets = sum(-(-rows // _rows(MOST_WAYS)) for _, rows in products)
    few = parts_of(products[0][0].cols) == 8 and 2 * sets <= min(_processors(), 2 * MOST_PAIRS)
    share = sum(rows * m.cols * m.bits / 8 for m, rows in products) / _processors()
    cuts = [_cut(m, width, share, 2 if few else 1) for m, _ in products]
    return cuts if max(c.shared for c in cuts) <= _most_shared() else []


def _suits(m: QMatrix) -> bool:
    """Whether a warp's part of a row is a whole number of the blocks that it has on their way."""
    parts, block = parts_of(m.cols), block_of(m)
    on_their_way = 2 if block * m.bits > 512 else 512 // block
    return parts > 1 and m.cols % (parts * block * on_their_way) == 0


def _cut(m: QMatrix, width: int, share: float, halves: int) -> Cut:
    """`share`: bytes of weights that each block should have."""
    parts = parts_of(m.cols) // halves
    ways = min(MOST_WAYS, parts)
    kept, step = parts // ways, _rows(ways)
    chunk = m.cols // block_of(m) // (ways * halves)  # blocks of channels
    stage = (block_of(m) // 8 * width + 8) * 16
    stages = chunk if ways * chunk * stage <= _WHOLE else _AHEAD + 1
    sets = max(1, math.ceil(share * halves / (step * m.cols * m.bits / 8)))
    ring, sums = ways * stages * stage, ways * width * (step + 4) * 4
    last_at = ring + (kept - 1) * sums if sets > 1 else 0
    shared = max(ring + (kept - 1) * sums, last_at + sums)
    return Cut(ways, kept, halves, stages, sets, ring, last_at, shared)


def _rows(ways: int) -> int:
    """Rows that a block takes at a time."""
    return 16 * _WARPS // ways


@functools.cache
def _processors() -> int:
    return torch.cuda.get_device_properties().multi_processor_count


@functools.cache
def _most_shared() -> int:
    """Bytes of shared memory that a block may have."""
    most: int = torch.cuda.get_device_properties().shared_memory_per_block_optin  # type: ignore[attr-defined]
    return most


@functools.cache
def source() -> str:
    parts = "early", "gemv_codes", "gemv_reader", "gemv_few", "gemv_staged"
    return "".join((Path(__file__).parent / f"{part}.cu").read_text("utf-8") for part in parts)


def options(matrices: Sequence[QMatrix], width: int, ways: int) -> tuple[str, ...]:
    words = "-DKERNEL=linears", f"-DN={width}", f"-DWAYS={ways}"
    return formats("FEW_FORMATS", matrices), *words


@functools.cache
def _kernel(options: tuple[str, ...], shared: int) -> Kernel:
    return Module(source(), options).kernel("linears", shared)
