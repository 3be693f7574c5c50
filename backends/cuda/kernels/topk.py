"""The k largest of each row of scores: launches topk.cu, in two levels for long rows."""

import ctypes
import functools
from pathlib import Path

import torch
from torch import Tensor

from ds4.errors import BackendError

from ..nvrtc import Kernel, Module

AT_ONCE = 16384  # most scores that one block holds
SHORTEST = 4096  # a longer row is cut into parts of at least this
FEW = 32  # rows below which a row should finish early rather than share the chip
WHOLE, SEGMENT, MERGE = range(3)  # topk.cu's Use


def choose(scores: Tensor, pos: Tensor, ratio: int, entries: int, ids: Tensor) -> None:
    """Fill ids int32 (T, k) with the entries of the k largest scores, ascending, then -1.

    scores float32 (at least T, stride), stride a multiple of 4 from `entries` up: of a row with
    position p only the first (p + 1) // ratio are read, and none if these are k or fewer. Of equal
    scores the earlier wins. Raises BackendError if k is too large.
    """
    rows, k = ids.shape
    segment = segment_of(entries, k)
    if not segment:
        _launch(WHOLE, entries, 1, scores, ids, pos, scores, ids, ratio, entries, segment)
        return
    parts = -(-entries // segment)
    stride = -(-parts * k // 4) * 4
    kept = torch.empty(rows, stride, device=scores.device)
    names = torch.empty(rows, stride, dtype=torch.int32, device=scores.device)
    _launch(SEGMENT, segment, parts, scores, ids, pos, kept, names, ratio, entries, segment, k)
    _launch(MERGE, parts * k, 1, kept, names, pos, kept, ids, ratio, entries, segment)


def segment_of(entries: int, k: int) -> int:
    """Scores in each part of a row, or 0 for a row that one block takes."""
    if entries <= AT_ONCE:
        return 0
    segment = SHORTEST
    while segment <= AT_ONCE:
        if -(-entries // segment) * k <= AT_ONCE and segment >= 2 * k:
            return segment
        segment *= 2
    raise BackendError(f"the indexer cannot choose {k} of {entries} entries: shorten the context")


def _launch(
    use: int,
    longest: int,
    parts: int,
    scores: Tensor,
    names: Tensor,
    pos: Tensor,
    kept: Tensor,
    ids: Tensor,
    ratio: int,
    entries: int,
    segment: int,
    k: int = 0,
) -> None:
    """One launch of topk.cu's `choose`; `longest` is the most scores that a block sees."""
    rows = len(pos)
    threads, values = block_of(longest, rows)
    sizes = [use, ratio, entries, k or ids.shape[1], segment, scores.stride(0), ids.stride(0)]
    kernel = _kernel(threads, values)
    pointers = [ctypes.c_uint64(x.data_ptr()) for x in (scores, names, pos, kept, ids)]
    kernel((parts, rows, 1), threads, *pointers, *map(ctypes.c_int, sizes))


def block_of(longest: int, rows: int) -> tuple[int, int]:
    """Threads of a block and scores a thread; these are a power of two from 4 to 16."""
    threads = 256 if rows > FEW and longest <= 2048 else 512 if longest <= 8192 else 1024
    values = 4
    while threads * values < longest:
        values *= 2
    return threads, values


def source() -> str:
    return Path(__file__).with_suffix(".cu").read_text("utf-8")


def options(threads: int, values: int) -> list[str]:
    """The compiler's."""
    return [f"-DTHREADS={threads}", f"-DVALUES={values}"]


@functools.cache
def _kernel(threads: int, values: int) -> Kernel:
    return Module(source(), options(threads, values)).kernel("choose")
