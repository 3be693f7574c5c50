"""Sparse attention of many tokens on Hopper: 64 heads of one token against tiles of 64 keys.

In Gluon, which arranges by hand what Triton would not: the warpgroups share a product's columns,
and while the tensor cores work on a tile the next is decoded and the one after loaded.
"""

from collections.abc import Sequence

import triton
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from .attention_hopper_rows import KEYS, C, R, decode, fetch, find

HEADS = gl.constexpr(64)
LOG2E = gl.constexpr(1.4426950408889634)
QUARTER = gl.constexpr(1.5707963267948966)  # of a turn
MOST = gl.constexpr(65504.0)

WIDE = gl.constexpr(gl.BlockedLayout([1, 8], [1, 32], [8, 1], [1, 0]))
SCORES = gl.constexpr(gl.NVMMADistributedLayout([3, 0], [4, 2], [16, 32, 16]))
RESULT = gl.constexpr(gl.NVMMADistributedLayout([3, 0], [4, 2], [16, 256, 16]))
TILE = gl.constexpr(gl.NVMMASharedLayout(128, 16, 2))
LINE = gl.constexpr(gl.SwizzledSharedLayout(1, 1, 1, [0]))


def serves(heads: int) -> bool:
    """Fewer than 64, as one of several ranks may have, take the time of 64."""
    return heads % 64 == 0 or (heads < 64 and heads % 16 == 0)


def attention(
    q: Tensor,
    freqs: Tensor,
    sink: Tensor,
    slot: Tensor,
    pos: Tensor,
    ids: Tensor | None,
    ring: Sequence[Tensor],
    pool: Sequence[Tensor],
    ratio: int,
    window: int,
    eps: float,
    out: Tensor,
    ps: int,
    ts: int,
) -> None:
    """As attention.attention, for packed rows of 512 channels, 64 rotary; heads: see `serves`."""
    T, H, _ = q.shape
    n_ids = 0 if ids is None else ids.shape[1]
    attend[(T, triton.cdiv(H, 64))](
        *(q, q.stride(0), freqs, sink, slot, pos, pos if ids is None else ids, n_ids),
        *(*ring, ring[0].shape[1] - 1, *pool, pool[0].shape[1] - 1, max(1, ratio)),
        *(out, ps // 8, ts // 8, eps, C.value**-0.5),
        H=H,
        WINDOW=window,
        POOL=ratio > 0,
        IDS=max(512, triton.next_power_of_2(n_ids)) if n_ids else 0,
        num_warps=8,
    )


thread_barrier = gl.thread_barrier if hasattr(gl, "thread_barrier") else gl.barrier  # since 3.9


@gluon.jit
def rotation(pos, freqs, layout: gl.constexpr):
    """As attention_tiles.rotation."""
    freq = gl.load(freqs + gl.arange(0, R // 2, layout))
    angle = (pos.to(gl.float32) * freq).to(gl.float64)
    quarters = gl.floor(angle * (1 / QUARTER) + 0.5)
    x = (angle - quarters * QUARTER).to(gl.float32)
    xx = x * x
    cos = 1 - 0.5 * xx + xx * xx * (4.16666456e-2 + xx * (-1.38873162e-3 + xx * 2.44331571e-5))
    sin = x + x * xx * (-1.66666546e-1 + xx * (8.33216087e-3 - xx * 1.95152959e-4))
    quarter = quarters.to(gl.int32)
    odd = (quarter & 1) == 1
    turned_cos = gl.where(odd, sin, cos)
    turned_sin = gl.where(odd, cos, sin)
    cos = gl.where(((quarter + 1) & 2) == 2, -turned_cos, turned_cos)
    return cos, gl.where((quarter & 2) == 2, -turned_sin, turned_sin)


@gluon.jit
def rotate(x, pos, freqs, sign: gl.constexpr):
    """(rows, 512) with the last 64 channels turned, as interleaved pairs."""
    rows: gl.constexpr = x.shape[0]
    a, b = gl.split(gl.reshape(x, [rows, C // R, R // 2, 2]))
    layout: gl.constexpr = a.type.layout
    group: gl.constexpr = gl.SliceLayout(0, gl.SliceLayout(2, layout))
    cos, sin = rotation(pos, freqs, gl.SliceLayout(0, gl.SliceLayout(0, layout)))
    cos = gl.expand_dims(gl.expand_dims(cos, 0), 0)
    sin = gl.expand_dims(gl.expand_dims(sin, 0), 0) * sign
    last = gl.arange(0, C // R, group) == C // R - 1
    last = gl.expand_dims(gl.expand_dims(last, 0), 2)
    turned_a = gl.where(last, a * cos - b * sin, a)
    turned_b = gl.where(last, a * sin + b * cos, b)
    turned = gl.reshape(gl.join(turned_a, turned_b), [rows, C])
    return gl.convert_layout(turned, x.type.layout)


@gluon.jit(do_not_specialize=["n_ids", "ring_size", "pool_size", "ratio", "ps", "ts"])
def attend(
    q,
    q_stride,
    freqs,
    sink,
    slots,
    positions,
    ids,
    n_ids,
    ring0,
    ring1,
    ring2,
    ring_size,
    pool0,
    pool1,
    pool2,
    pool_size,
    ratio,
    out,
    ps,
    ts,
    eps,
    scale,
    H: gl.constexpr,
    WINDOW: gl.constexpr,
    POOL: gl.constexpr,
    IDS: gl.constexpr,
):
    """Program (token, block of 64 heads)."""
    LIVE: gl.constexpr = min(H, HEADS)  # rows beyond compute with what memory holds, for nobody
    t = gl.program_id(0)
    first_head = gl.program_id(1) * HEADS
    pos = gl.load(positions + t)
    slot = gl.load(slots + t)
    n_window = gl.minimum(pos + 1, WINDOW)
    n_entries = 0
    ids_at = t * n_ids
    if IDS:
        j = gl.arange(0, IDS, gl.BlockedLayout([1], [32], [8], [0]))
        there = gl.load(ids + ids_at + j, mask=j < n_ids, other=-1) >= 0
        n_entries = gl.max(gl.where(there, j + 1, 0), 0)
    elif POOL:
        n_entries = gl.minimum((pos + 1) // ratio, pool_size)
    windows = gl.cdiv(n_window, KEYS)
    blocks = windows + gl.cdiv(n_entries, KEYS)
    span = windows, n_window, n_entries
    query = gl.allocate_shared_memory(gl.float16, [HEADS, C], TILE)
    tiles = gl.allocate_shared_memory(gl.float16, [2, KEYS, C], TILE)
    bias = gl.allocate_shared_memory(gl.float32, [2, KEYS], LINE)
    weights = gl.allocate_shared_memory(gl.float16, [HEADS, KEYS], TILE)

    for i in gl.static_range(LIVE // 16):
        head = i * 16 + gl.arange(0, 16, gl.SliceLayout(1, WIDE))
        channel = gl.expand_dims(gl.arange(0, C, gl.SliceLayout(0, WIDE)), 0)
        row = q + t.to(gl.int64) * q_stride + first_head * C
        x = gl.load(row + gl.expand_dims(head * C, 1) + channel)
        norm = 1.0 / gl.sqrt(gl.sum(x * x, 1) / C + eps)
        x = rotate(x * gl.expand_dims(norm, 1), pos, freqs, 1)
        query.slice(i * 16, 16, 0).store(x.to(gl.float16))

    row, seen = find(0, span, slot, pos, ids, ids_at, ring_size, pool_size, IDS > 0)
    raw = fetch(windows > 0, ring0, ring1, ring2, pool0, pool1, pool2, row, seen)
    decode(tiles.index(0), raw, seen, bias.index(0))
    row, seen = find(1, span, slot, pos, ids, ids_at, ring_size, pool_size, IDS > 0)
    raw = fetch(windows > 1, ring0, ring1, ring2, pool0, pool1, pool2, row, seen)

    heads = gl.arange(0, HEADS, gl.SliceLayout(1, SCORES))
    high = gl.load(sink + first_head + heads, mask=heads < LIVE, other=0.0) * LOG2E
    column = gl.expand_dims(gl.arange(0, KEYS, gl.SliceLayout(0, SCORES)), 0)
    blank = gl.zeros([HEADS, KEYS], gl.float32, SCORES)
    sums = blank + gl.where(column == 0, 1.0, 0.0)  # the sink's share of the denominator
    acc = gl.zeros([HEADS, C], gl.float32, RESULT)
    for b in range(0, blocks):
        now = tiles.index(b & 1)
        fence_async_shared()
        thread_barrier()
        s = warpgroup_mma(query, now.permute([1, 0]), blank, use_acc=False, is_async=True)
        row, next_seen = find(b + 2, span, slot, pos, ids, ids_at, ring_size, pool_size, IDS > 0)
        s = warpgroup_mma_wait(0, [s])
        floor = bias.index(b & 1).load(gl.SliceLayout(0, SCORES))
        s = s * (scale * LOG2E) + gl.expand_dims(floor, 0)
        new_high = gl.maximum(high, gl.max(s, 1))
        fade = gl.exp2(high - new_high)
        p = gl.exp2(s - gl.expand_dims(new_high, 1))
        sums = sums * gl.expand_dims(fade, 1) + p
        high = new_high
        weights.store(p.to(gl.float16))
        fade = gl.convert_layout(fade, gl.SliceLayout(1, RESULT), assert_trivial=True)
        acc = acc * gl.expand_dims(fade, 1)
        fence_async_shared()
        thread_barrier()
        acc = warpgroup_mma(weights, now, acc, is_async=True)
        decode(tiles.index((b + 1) & 1), raw, seen, bias.index((b + 1) & 1))
        seen = next_seen
        raw = fetch(b + 2 < windows, ring0, ring1, ring2, pool0, pool1, pool2, row, seen)
        acc = warpgroup_mma_wait(0, [acc])

    total = gl.sum(sums, 1)
    share = gl.convert_layout(1.0 / total, gl.SliceLayout(1, RESULT), assert_trivial=True)
    o = rotate(acc * gl.expand_dims(share, 1), pos, freqs, -1)
    o = gl.minimum(gl.maximum(o, -MOST), MOST).to(gl.float16)
    query.store(o)
    for i in gl.static_range(LIVE // 16):
        k = (first_head + i * 16 + gl.arange(0, 16, gl.SliceLayout(1, WIDE))) * C
        k = gl.expand_dims(k, 1) + gl.expand_dims(gl.arange(0, C, gl.SliceLayout(0, WIDE)), 0)
        at = out + (k // 8).to(gl.int64) * (ps * 8) + t.to(gl.int64) * (ts * 8) + k % 8
        gl.store(at, query.slice(i * 16, 16, 0).load(WIDE))
