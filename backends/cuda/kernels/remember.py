"""What a step leaves in a layer's cache: window rows, open blocks and finished entries.

For a decode step everything is one launch. A block that the step completes has its last rows among
the step's own tokens, which other programs of the same launch are still writing to the ring: the
program that pools it takes those rows from the step's buffer. A longer step takes two launches, and
the second one finds everything in the ring; unless the ring is shorter than the step: then blocks
are pooled first, from ring and buffer, and what the next steps need is stored afterwards.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from ..rows import PackedRows, planes, scales_stride
from .early import starts_early
from .remember_kernels import remember_kernel, write_kernel

ONE_LAUNCH = 32  # most tokens of a step that is searched for a block's rows
STORE_WARPS, POOL_WARPS = 4, 8
PDL = True
POOL_ROWS = 16  # of a block, pooled at once


class Compressor(NamedTuple):
    """One compressor of a layer, d channels wide, with h halves: 2 at ratio 4, else 1."""

    projected: Tensor  # float32 (T, 2 h d): [K | gate] of the step's tokens, of any row stride
    ape: Tensor  # float32 (ratio, h d)
    norm: Tensor  # (d,)
    ring: PackedRows  # float rows, 2 h d wide
    pool: PackedRows  # kv rows for the first compressor, index rows for the second; d wide


class Norm(NamedTuple):
    """An RMS norm that the step needs at the same time: see norm.rms_norm."""

    x: Tensor
    weight: Tensor
    out: Tensor
    strides: tuple[int, int]


def remember(
    kv: Tensor,
    kv_norm: Tensor,
    freqs: Tensor,
    window: PackedRows,
    compressors: Sequence[Compressor],
    slot: Tensor,
    pos: Tensor,
    emit: Tensor | None,
    ratio: int,
    eps: float,
    norm: Norm | None = None,
) -> None:
    """The operation `remember` of ds4/backend.py, and beside it `norm` for a step of ONE_LAUNCH.

    kv float32 (T, C), of any row stride; kv_norm (C,); freqs float32 (R / 2,); slot and pos int32
    (T,); emit int32 (E, 2), a slot and a block that the step completes, or -1. No, one (HCA) or two
    (CSA: the layer's and the indexer's) compressors.
    """
    first, *rest = compressors or [_nothing(kv, kv_norm, window)]
    second = rest[0] if rest else first
    tokens, blocks = len(kv), 0 if emit is None else len(emit)
    emit = slot if emit is None else emit
    stores, pools = tokens * (1 + len(compressors)), blocks * len(compressors)
    fused = tokens <= ONE_LAUNCH
    assert fused or norm is None
    beside = norm or Norm(kv, kv_norm, kv, (8, 8))
    norms = tokens if norm else 0
    launches = [(stores + pools + norms, True)] if fused else [(stores, True), (pools, False)]
    long = bool(compressors) and not fused and first.ring.size < tokens + 2 * ratio
    if long:
        launches.reverse()
    for programs, storing in launches:
        if not programs:
            continue
        remember_kernel[(programs,)](
            kv,
            kv.stride(0),
            kv_norm,
            freqs,
            *planes(window),
            window.size,
            *_arguments(first),
            *_arguments(second),
            slot,
            pos,
            emit,
            tokens,
            _bases(slot, pos, len(first.pool.planes[0])) if long else slot,
            stores if storing else 0,
            stores + pools,
            beside.x,
            beside.x.stride(0),
            beside.weight,
            beside.out,
            *(stride // 8 for stride in beside.strides),
            eps,
            C=window.width,
            R=window.rotary,
            BC=triton.next_power_of_2(window.width),
            SCALES=scales_stride(window),
            IC=second.pool.width,
            IA=hadamard_factor(second.pool.width),
            BI=triton.next_power_of_2(second.pool.width),
            RATIO=ratio,
            HALVES=2 if ratio == 4 else 1,
            COMPRESSORS=len(compressors),
            NATIVE=window.data is None,
            STEP=triton.next_power_of_2(tokens) if fused and pools else 0,
            QN=beside.x.shape[1] if norm else 0,
            AT_ONCE=8 if ratio == 4 else POOL_ROWS,
            PDL=overlaps(kv),
            EARLY=starts_early(kv, tokens),
            LONG=long,
            launch_pdl=overlaps(kv),
            num_warps=STORE_WARPS if storing and not (fused and pools) else POOL_WARPS,
        )


def _bases(slot: Tensor, pos: Tensor, slots: int) -> Tensor:
    """int32 (slots + 1,): for slots of a step, which of its tokens would be at position 0."""
    base = torch.full((slots + 1,), -(1 << 30), dtype=torch.int32, device=slot.device)
    token = torch.arange(len(slot), dtype=torch.int32, device=slot.device)
    return base.scatter_(0, torch.where(pos >= 0, slot, slots).long(), token - pos)


def write(rows: PackedRows, x: Tensor, slot: Tensor, pos: Tensor) -> None:
    """Store float32 (T, width), of any row stride, at (slot, pos % size), rounded as rows are."""
    index = rows.kind == "index"
    write_kernel[(len(x),)](
        x,
        x.stride(0),
        *planes(rows),
        rows.size,
        slot,
        pos,
        C=rows.width,
        R=0 if index or rows.data is not None else rows.rotary,
        B=triton.next_power_of_2(rows.width),
        A=hadamard_factor(rows.width),
        SCALES=scales_stride(rows),
        INDEX=index,
        NATIVE=rows.data is None,
    )


def overlaps(x: Tensor) -> bool:
    """Whether a launch may start while the one before it ends: its kernel waits for that itself."""
    return PDL and x.is_cuda and torch.cuda.get_device_capability(x.device)[0] >= 9


def hadamard_factor(width: int) -> int:
    """The Hadamard matrix of `width` = 2^n is that of 2^(n // 2) times that of the rest."""
    return int(1 << (width.bit_length() - 1) // 2)


def _arguments(m: Compressor) -> list[Tensor | int]:
    rows, ring = m.projected, m.ring.data
    assert ring is not None
    return [rows, rows.stride(0), m.ape, m.norm, ring, m.ring.size, *planes(m.pool), m.pool.size]


def _nothing(kv: Tensor, norm: Tensor, window: PackedRows) -> Compressor:
    """Fills the arguments of a layer without compressors; no program reads it."""
    empty = PackedRows("float", 1, 32, 0, data=kv)
    return Compressor(kv, norm, norm, empty, empty)
