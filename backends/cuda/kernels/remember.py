# mypy: disable-error-code="no-untyped-def,assignment"
"""What a step leaves in a layer's cache: window rows, open blocks and finished entries.

For a decode step everything is one launch. A block that the step completes has its last rows among
the step's own tokens, which other programs of the same launch are still writing to the ring: the
program that pools it takes those rows from the step's buffer. A longer step takes two launches, and
the second one finds everything in the ring.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..rows import PackedRows
from .row_format import normed, rotate, store_index, store_kv

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
) -> None:
    """The operation `remember` of ds4/backend.py.

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
    launches = [(stores + pools, True)] if fused else [(stores, True), (pools, False)]
    for programs, storing in launches:
        if not programs:
            continue
        _remember[(programs,)](
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
            stores if storing else 0,
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
            AT_ONCE=8 if ratio == 4 else POOL_ROWS,
            PDL=overlaps(kv),
            launch_pdl=overlaps(kv),
            num_warps=STORE_WARPS if storing and not (fused and pools) else POOL_WARPS,
        )


def write(rows: PackedRows, x: Tensor, slot: Tensor, pos: Tensor) -> None:
    """Store float32 (T, width), of any row stride, at (slot, pos % size), rounded as rows are."""
    index = rows.kind == "index"
    _write[(len(x),)](
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


def planes(rows: PackedRows) -> list[Tensor]:
    """Three planes as a kernel takes them: codes, scales and tail, or the float32 one thrice."""
    if rows.data is not None:
        return [rows.data] * 3
    assert rows.codes is not None
    assert rows.scales is not None
    tail = rows.codes if rows.tail is None else rows.tail.view(torch.int16)
    return [rows.codes, rows.scales, tail]


def scales_stride(rows: PackedRows) -> int:
    """Bytes from a row's scales to the next row's."""
    return 0 if rows.scales is None else rows.scales.shape[-1]


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


@triton.jit
def _remember(
    kv,
    kv_stride,
    kv_norm,
    freqs,
    window_codes,
    window_scales,
    window_tail,
    window_size,
    rows0,
    stride0,
    ape0,
    norm0,
    ring0,
    ring_size0,
    codes0,
    scales0,
    tail0,
    pool_size0,
    rows1,
    stride1,
    ape1,
    norm1,
    ring1,
    ring_size1,
    codes1,
    scales1,
    tail1,
    pool_size1,
    slots,
    positions,
    emit,
    tokens,
    stores,
    eps,
    C: tl.constexpr,
    R: tl.constexpr,
    BC: tl.constexpr,
    SCALES: tl.constexpr,
    IC: tl.constexpr,
    IA: tl.constexpr,
    BI: tl.constexpr,
    RATIO: tl.constexpr,
    HALVES: tl.constexpr,
    COMPRESSORS: tl.constexpr,
    NATIVE: tl.constexpr,
    STEP: tl.constexpr,
    AT_ONCE: tl.constexpr,
    PDL: tl.constexpr,
):
    """Programs 0..stores-1 store a row each, token by token; the others pool a block each."""
    if PDL:
        tl.extra.cuda.gdc_wait()
    program = tl.program_id(0)
    if program < stores:
        t = program // (1 + COMPRESSORS)
        part = program % (1 + COMPRESSORS)
        slot = tl.load(slots + t).to(tl.int64)
        pos = tl.load(positions + t)
        if part == 0:
            x = kv + t.to(tl.int64) * kv_stride
            row = slot * (window_size + 1) + place(pos, window_size)
            into = window_codes, window_scales, window_tail
            keep_token(x, kv_norm, freqs, into, row, pos, eps, C, R, BC, SCALES, NATIVE)
        elif part == 1:
            row = slot * (ring_size0 + 1) + place(pos, ring_size0)
            copy(rows0 + t.to(tl.int64) * stride0, ring0, row, 2 * HALVES * C, 2 * HALVES * BC)
        else:
            row = slot * (ring_size1 + 1) + place(pos, ring_size1)
            copy(rows1 + t.to(tl.int64) * stride1, ring1, row, 2 * HALVES * IC, 2 * HALVES * BI)
    elif COMPRESSORS > 0:
        work = program - stores
        slot = tl.load(emit + 2 * (work // COMPRESSORS)).to(tl.int64)
        block = tl.load(emit + 2 * (work // COMPRESSORS) + 1)
        if block >= 0:
            if work % COMPRESSORS == 0:
                step = rows0, stride0, slots, positions, tokens
                state = ring0, ring_size0, ape0
                row = slot * (pool_size0 + 1) + block
                x = pooled(step, state, slot, block, C, BC, RATIO, HALVES, STEP, AT_ONCE)
                into = codes0, scales0, tail0
                keep_entry(x, norm0, freqs, into, row, block * RATIO, eps, C, R, BC, SCALES, NATIVE)
            elif COMPRESSORS > 1:
                keep_index_entry(
                    pooled(
                        (rows1, stride1, slots, positions, tokens),
                        (ring1, ring_size1, ape1),
                        slot,
                        block,
                        IC,
                        BI,
                        RATIO,
                        HALVES,
                        STEP,
                        AT_ONCE,
                    ),
                    norm1,
                    freqs,
                    codes1,
                    scales1,
                    slot * (pool_size1 + 1) + block,
                    block * RATIO,
                    eps,
                    IC,
                    R,
                    BI,
                    IA,
                    NATIVE,
                )


@triton.jit
def place(pos, size):
    """The row of a position in a ring; padding's is the scratch row."""
    return tl.where(pos < 0, size, pos % size)


@triton.jit
def keep_token(
    x,
    norm,
    freqs,
    into,
    row,
    pos,
    eps,
    C: tl.constexpr,
    R: tl.constexpr,
    B: tl.constexpr,
    SCALES: tl.constexpr,
    NATIVE: tl.constexpr,
):
    c = tl.arange(0, B)
    x = tl.load(x + c, mask=c < C, other=0.0)[None]
    keep_entry(x, norm, freqs, into, row, pos, eps, C, R, B, SCALES, NATIVE)


@triton.jit
def keep_entry(
    x,
    norm,
    freqs,
    into,
    row,
    pos,
    eps,
    C: tl.constexpr,
    R: tl.constexpr,
    B: tl.constexpr,
    SCALES: tl.constexpr,
    NATIVE: tl.constexpr,
):
    """Norm, rotate and store a key-value row."""
    codes, scales, tail = into
    x = rotate(normed(x, norm, C, B, eps), pos, freqs, 1, C, R, B)
    store_kv(codes, scales, tail, row, x, C, R, B, SCALES, NATIVE)


@triton.jit
def keep_index_entry(
    x,
    norm,
    freqs,
    codes,
    scales,
    row,
    pos,
    eps,
    C: tl.constexpr,
    R: tl.constexpr,
    B: tl.constexpr,
    A: tl.constexpr,
    NATIVE: tl.constexpr,
):
    x = rotate(normed(x, norm, C, B, eps), pos, freqs, 1, C, R, B)
    store_index(codes, scales, row, x, C, A, B, NATIVE)


@triton.jit
def copy(x, into, row, C: tl.constexpr, B: tl.constexpr):
    c = tl.arange(0, B)
    tl.store(into + row * C + c, tl.load(x + c, mask=c < C), mask=c < C)


@triton.jit
def pooled(
    step,
    state,
    slot,
    block,
    C: tl.constexpr,
    B: tl.constexpr,
    RATIO: tl.constexpr,
    HALVES: tl.constexpr,
    STEP: tl.constexpr,
    AT_ONCE: tl.constexpr,
):
    """The rows of a block weighed into one, (1, B): a softmax over rows in each channel.

    With two halves the block before comes first, seen through the first half of its channels.
    With STEP, `step`'s tokens come from its own buffer; it is no less than their number.
    """
    BEFORE: tl.constexpr = RATIO * (HALVES - 1)
    ROWS: tl.constexpr = RATIO * HALVES
    WIDTH: tl.constexpr = HALVES * C
    rows, stride, slots, positions, tokens = step
    ring, ring_size, ape = state
    c = tl.arange(0, B)[None]
    base = ring + slot * (ring_size + 1) * (2 * WIDTH)
    high = tl.full((1, B), float("-inf"), tl.float32)
    total = tl.zeros((1, B), tl.float32)
    entry = tl.zeros((1, B), tl.float32)
    for first in range(0, ROWS, AT_ONCE):
        r = first + tl.arange(0, AT_ONCE)
        p = block * RATIO - BEFORE + r
        seen = ((r < ROWS) & (p >= 0))[:, None] & (c < C)
        column = tl.where(r < BEFORE, 0, WIDTH - C)[:, None] + c
        old = seen
        if STEP > 0:
            t = newest(slots, positions, tokens, slot, p, STEP)
            old = seen & (t < 0)[:, None]
        at = base + (p % ring_size).to(tl.int64)[:, None] * (2 * WIDTH) + column
        k = tl.load(at, mask=old, other=0.0)
        gate = tl.load(at + WIDTH, mask=old, other=0.0)
        if STEP > 0:
            at = rows + t.to(tl.int64)[:, None] * stride + column
            new = seen & (t >= 0)[:, None]
            k += tl.load(at, mask=new, other=0.0)
            gate += tl.load(at + WIDTH, mask=new, other=0.0)
        gate += tl.load(ape + (r % RATIO)[:, None] * WIDTH + column, mask=seen, other=0.0)
        gate = tl.where(seen, gate, float("-inf"))
        above = tl.maximum(high, tl.max(gate, 0)[None])
        above = tl.where(c < C, above, 0.0)
        fade = tl.exp(high - above)
        weight = tl.exp(gate - above)
        total = total * fade + tl.sum(weight, 0)[None]
        entry = entry * fade + tl.sum(weight * k, 0)[None]
        high = above
    return tl.where(c < C, entry / total, 0.0)


@triton.jit
def newest(slots, positions, tokens, slot, p, STEP: tl.constexpr):
    """Which token of the step is at each of some positions of a slot, or -1."""
    t = tl.arange(0, STEP)
    there = t < tokens
    slot_of = tl.load(slots + t, mask=there, other=-1)
    pos_of = tl.load(positions + t, mask=there, other=-1)
    hit = (slot_of == slot)[None] & (pos_of[None] == p[:, None]) & (p >= 0)[:, None]
    return tl.max(tl.where(hit, t[None], -1), 1)


@triton.jit
def _write(
    x,
    stride,
    codes,
    scales,
    tail,
    size,
    slots,
    positions,
    C: tl.constexpr,
    R: tl.constexpr,
    B: tl.constexpr,
    A: tl.constexpr,
    SCALES: tl.constexpr,
    INDEX: tl.constexpr,
    NATIVE: tl.constexpr,
):
    t = tl.program_id(0)
    c = tl.arange(0, B)
    row = tl.load(slots + t).to(tl.int64) * (size + 1) + place(tl.load(positions + t), size)
    values = tl.load(x + t.to(tl.int64) * stride + c, mask=c < C, other=0.0)[None]
    if INDEX:
        store_index(codes, scales, row, values, C, A, B, NATIVE)
    else:
        store_kv(codes, scales, tail, row, values, C, R, B, SCALES, NATIVE)
