# mypy: disable-error-code="no-untyped-def,assignment"
"""Kernels of what a step leaves in a cache (remember.py)."""

import triton
import triton.language as tl

from .norm import normed_row
from .pooling import pooled
from .row_format import finished, norm_and_rotation, store_index, store_kv


@triton.jit
def remember_kernel(
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
    base_of,
    stores,
    norms,
    queries,
    queries_stride,
    query_weight,
    query_out,
    panel,
    place_stride,
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
    QN: tl.constexpr,
    AT_ONCE: tl.constexpr,
    PDL: tl.constexpr,
    EARLY: tl.constexpr,
    LONG: tl.constexpr,
):
    """Programs 0..stores-1 store a row each, token by token; others pool a block each; from
    `norms` on they norm a row each, if QN is not 0."""
    if EARLY:
        tl.extra.cuda.gdc_launch_dependents()
    if PDL:
        tl.extra.cuda.gdc_wait()
    program = tl.program_id(0)
    if program < stores:
        t = program // (1 + COMPRESSORS)
        part = program % (1 + COMPRESSORS)
        slot = tl.load(slots + t).to(tl.int64)
        pos = tl.load(positions + t)
        if part == 0:
            c = tl.arange(0, BC)
            token = kv + t.to(tl.int64) * kv_stride + c
            token = tl.load(token, mask=c < C, other=0.0)[None]
            token = finished(token, norm_and_rotation(kv_norm, pos, freqs, C, R, BC), C, eps)
            row = slot * (window_size + 1) + place(pos, window_size)
            into = window_codes, window_scales, window_tail
            store_kv(into, row, token, C, R, BC, SCALES, NATIVE)
        elif part == 1:
            at = place(pos, ring_size0)
            if LONG:
                at = tl.where(later(slots, positions, tokens, t, ring_size0), ring_size0, at)
            row = slot * (ring_size0 + 1) + at
            copy(rows0 + t.to(tl.int64) * stride0, ring0, row, 2 * HALVES * C, 2 * HALVES * BC)
        else:
            at = place(pos, ring_size1)
            if LONG:
                at = tl.where(later(slots, positions, tokens, t, ring_size1), ring_size1, at)
            row = slot * (ring_size1 + 1) + at
            copy(rows1 + t.to(tl.int64) * stride1, ring1, row, 2 * HALVES * IC, 2 * HALVES * BI)
    elif program >= norms:
        if QN > 0:
            normed_row(
                queries, queries_stride, query_weight, query_out, program - norms, QN,
                panel, place_stride, eps, triton.next_power_of_2(QN),
            )  # fmt: skip
    elif COMPRESSORS > 0:
        work = program - stores
        slot = tl.load(emit + 2 * (work // COMPRESSORS)).to(tl.int64)
        block = tl.load(emit + 2 * (work // COMPRESSORS) + 1)
        if block >= 0:
            if work % COMPRESSORS == 0:
                extras = norm_and_rotation(norm0, block * RATIO, freqs, C, R, BC)
                step = rows0, stride0, slots, positions, tokens, base_of
                state = ring0, ring_size0, ape0
                entry = pooled(step, state, slot, block, C, BC, RATIO, HALVES, STEP, AT_ONCE, LONG)
                row = slot * (pool_size0 + 1) + block
                into = codes0, scales0, tail0
                store_kv(into, row, finished(entry, extras, C, eps), C, R, BC, SCALES, NATIVE)
            elif COMPRESSORS > 1:
                index_extras = norm_and_rotation(norm1, block * RATIO, freqs, IC, R, BI)
                index_step = rows1, stride1, slots, positions, tokens, base_of
                index_state = ring1, ring_size1, ape1
                index_entry = pooled(
                    index_step, index_state, slot, block, IC, BI, RATIO, HALVES, STEP, AT_ONCE,
                    LONG,
                )  # fmt: skip
                index_entry = finished(index_entry, index_extras, IC, eps)
                index_row = slot * (pool_size1 + 1) + block
                store_index(codes1, scales1, index_row, index_entry, IC, IA, BI, NATIVE)


@triton.jit
def later(slots, positions, tokens, t, size):
    """Whether a later token of the step takes this one's row of a ring."""
    there = t + size < tokens
    slot = tl.load(slots + t + size, mask=there, other=-1)
    pos = tl.load(positions + t + size, mask=there, other=-1)
    return (slot == tl.load(slots + t)) & (pos == tl.load(positions + t) + size)


@triton.jit
def place(pos, size):
    """The row of a position in a ring; padding's is the scratch row."""
    return tl.where(pos < 0, size, pos % size)


@triton.jit
def copy(x, into, row, C: tl.constexpr, B: tl.constexpr):
    c = tl.arange(0, B)
    tl.store(into + row * C + c, tl.load(x + c, mask=c < C), mask=c < C)


@triton.jit
def write_kernel(
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
        store_kv((codes, scales, tail), row, values, C, R, B, SCALES, NATIVE)
