"""Rows of many caches to one buffer of bytes and back, in one launch.

In the buffer a row's parts follow each other, as in a snapshot; in a cache each part is in a plane
of its own (rows.py).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 2048


@dataclass(frozen=True)
class Strip:
    """Consecutive rows of a plane, contiguous there, and their place in the buffer, in bytes."""

    address: int
    width: int
    rows: int
    at: int
    row: int  # from one row in the buffer to the next


@triton.jit
def _move(buffer, table, SAVE: tl.constexpr, BLOCK: tl.constexpr):
    strip = table + tl.program_id(0) * 5
    plane = tl.load(strip).to(tl.pointer_type(buffer.dtype.element_ty))
    width, rows = tl.load(strip + 1), tl.load(strip + 2)
    first = tl.program_id(1) * BLOCK
    if first >= width * rows:
        return
    i = first + tl.arange(0, BLOCK)
    ok = i < width * rows
    here = buffer + tl.load(strip + 3) + i // width * tl.load(strip + 4) + i % width
    if SAVE:
        tl.store(here, tl.load(plane + i, ok), ok)
    else:
        tl.store(plane + i, tl.load(here, ok), ok)


def move(buffer: Tensor, strips: Sequence[Strip], save: bool) -> None:
    """Strips of planes to their places in a uint8 buffer, or from there to the planes."""
    if not strips:
        return
    table = np.array([(s.address, s.width, s.rows, s.at, s.row) for s in strips], np.int64)
    if not (table % 4).astype(bool)[:, [0, 1, 3, 4]].any():
        buffer = buffer.view(torch.int32)
        table[:, [1, 3, 4]] //= 4
    blocks = triton.cdiv(int((table[:, 1] * table[:, 2]).max()), BLOCK)
    on_device = torch.from_numpy(table).to(buffer.device, non_blocking=True)
    _move[len(table), blocks](buffer, on_device, SAVE=save, BLOCK=BLOCK)
