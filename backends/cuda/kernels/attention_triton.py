"""Sparse attention in Triton: every shape and cache mode, for where no faster kernel serves.

A few tokens have too few programs for a GPU, so that each token's keys are split among several,
and a second kernel combines them.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .attention_tiles import float_rows, packed_rows, query, rotate, rotation, store

# Integers that change between steps and layers: one kernel serves all their values.
_ANY = ["n_ids", "ring_size", "pool_size", "ratio", "ps", "ts", "splits"]
FEW = 32  # tokens of a step of decoding
LOWEST = tl.constexpr(-1.0e30)
LOG2E = tl.constexpr(1.4426950408889634)


class Tiling(NamedTuple):
    """How attend is cut up: heads and keys of a tile, splits of a token's keys."""

    heads: int
    keys: int
    splits: int
    warps: int


def check_shape(C: int, R: int) -> None:
    """Raises ValueError for heads of C channels, R rotary, that the kernels cannot serve."""
    if R < 2 or R & (R - 1) or C % R or C < 16:
        raise ValueError(f"attention: no kernel for heads of {C} channels, {R} of them rotary")


def tile(T: int, H: int, exact: bool) -> Tiling:
    """A fair choice for T tokens of H heads; of exact rows one that a few tokens share.

    A token's sums then have the same order alone and among others.
    """
    shared = 1 if exact and T <= FEW else T
    splits = max(1, min(32, 160 // (shared * triton.cdiv(H, 16))))
    return Tiling(16, 16 if exact else 32, splits, 4)


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
    way: Tiling,
) -> None:
    """As attention.attention; ratio 0 for no entries."""
    T, H, C = q.shape
    shape = {"H": H, "C": C, "R": 2 * len(freqs), "P": triton.next_power_of_2(C)}
    exact, n_ids = len(ring) == 1, 0 if ids is None else ids.shape[1]
    split = T * way.splits * H if way.splits > 1 else 1
    part = torch.empty(split * C, device=q.device)
    high, total = torch.empty(2, split, device=q.device)
    attend[(T, way.splits, triton.cdiv(H, way.heads))](
        *(q, q.stride(0), freqs, sink, slot, pos, pos if ids is None else ids, n_ids),
        *(*_three(ring), ring[0].shape[1] - 1, *_three(pool), pool[0].shape[1] - 1, max(1, ratio)),
        *(out, ps // 8, ts // 8, part, high, total, way.splits, eps, C**-0.5),
        **shape,
        WINDOW=window,
        POOL=ratio > 0,
        IDS=triton.next_power_of_2(n_ids) if n_ids else 0,
        SCALES=1 if exact else ring[1].shape[2],
        SPLIT=way.splits > 1,
        HB=way.heads,
        BN=way.keys,
        EXACT=exact,
        num_warps=way.warps,
    )
    if way.splits > 1:
        combine[(T, H)](
            *(part, high, total, sink, freqs, pos, out, ps // 8, ts // 8, way.splits),
            **shape,
            S=triton.next_power_of_2(way.splits),
        )


def _three(planes: Sequence[Tensor]) -> list[Tensor]:
    return [*planes] if len(planes) == 3 else [planes[0]] * 3


@triton.jit(do_not_specialize=_ANY)
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
    part,
    part_high,
    part_total,
    splits,
    eps,
    scale,
    H: tl.constexpr,
    C: tl.constexpr,
    R: tl.constexpr,
    P: tl.constexpr,
    WINDOW: tl.constexpr,
    POOL: tl.constexpr,
    IDS: tl.constexpr,
    SCALES: tl.constexpr,
    SPLIT: tl.constexpr,
    HB: tl.constexpr,
    BN: tl.constexpr,
    EXACT: tl.constexpr,
):
    """Program (token, split, block of heads): its share of the token's keys.

    With one split it writes the result; else its unnormalised sum, largest logit (in powers of
    two) and denominator, for `combine`.
    """
    t = tl.program_id(0)
    split = tl.program_id(1)
    heads = tl.program_id(2) * HB + tl.arange(0, HB)
    pos = tl.load(positions + t)
    slot = tl.load(slots + t).to(tl.int64)
    kind: tl.constexpr = tl.float32 if EXACT else tl.float16
    precision: tl.constexpr = "tf32x3" if EXACT else "ieee"

    n_window = tl.minimum(pos + 1, WINDOW)
    n_entries = 0
    if IDS:
        n_entries = named(ids + t * n_ids, n_ids, IDS)
    elif POOL:
        n_entries = tl.minimum((pos + 1) // ratio, pool_size)
    window_blocks = tl.cdiv(n_window, BN)
    blocks = window_blocks + tl.cdiv(n_entries, BN)
    each = tl.cdiv(blocks, splits)
    first = split * each
    last = tl.minimum(first + each, blocks)

    cos, sin = rotation(pos, freqs, R)
    x = query(q + t.to(tl.int64) * q_stride, heads, cos, sin, eps, H, C, R, P).to(kind)
    acc = tl.zeros((HB, P), tl.float32)
    high = tl.full((HB,), LOWEST, tl.float32)
    total = tl.zeros((HB,), tl.float32)
    if not SPLIT:
        high = tl.load(sink + heads, mask=heads < H, other=0.0) * LOG2E
        total += 1.0

    for b in tl.range(first, last, num_stages=1):
        windowed = b < window_blocks
        j = tl.where(windowed, b, b - window_blocks) * BN + tl.arange(0, BN)
        row = (pos - j) % ring_size
        seen = j < tl.where(windowed, n_window, n_entries)
        size = ring_size
        p0 = ring0
        p1 = ring1
        p2 = ring2
        if POOL:
            entry = j
            if IDS:
                there = tl.where(seen, b, -1) >= window_blocks
                entry = tl.load(ids + t * n_ids + j, mask=there, other=-1)
                seen = seen & (tl.where(windowed, 0, entry) >= 0)
            row = tl.where(windowed, row, entry)
            size = tl.where(windowed, ring_size, pool_size)
            p0 = tl.where(windowed, ring0, pool0)
            p1 = tl.where(windowed, ring1, pool1)
            p2 = tl.where(windowed, ring2, pool2)
        at = slot * (size + 1) + row
        if EXACT:
            k = float_rows(p0, at, seen, C, P)
        else:
            k = packed_rows(p0, p1, p2, at, seen, SCALES, C, R, P)
        s = tl.dot(x, tl.trans(k), input_precision=precision)
        s = tl.where(seen[None], s * (scale * LOG2E), float("-inf"))
        new_high = tl.maximum(high, tl.max(s, 1))
        fade = tl.exp2(high - new_high)
        p = tl.exp2(s - new_high[:, None])
        total = total * fade + tl.sum(p, 1)
        high = new_high
        acc = tl.dot(p.to(kind), k, acc * fade[:, None], input_precision=precision)

    if not SPLIT:
        o = rotate(acc * (1.0 / total)[:, None], cos, -sin, C, R)
        store(out, ps, ts, t, heads, o, H, C)
    else:
        at = (t.to(tl.int64) * splits + split) * H + heads
        tl.store(part_high + at, high, mask=heads < H)
        tl.store(part_total + at, total, mask=heads < H)
        if first < last:
            c = tl.arange(0, P)
            there = (heads < H)[:, None] & (c < C)[None]
            tl.store(part + at[:, None] * C + c[None], acc, mask=there)


@triton.jit
def named(ids, n_ids, IDS: tl.constexpr):
    """How many of a token's ids to look at: up to the last that is none of -1."""
    j = tl.arange(0, IDS)
    there = tl.load(ids + j, mask=j < n_ids, other=-1) >= 0
    return tl.max(tl.where(there, j + 1, 0))


@triton.jit(do_not_specialize=_ANY)
def combine(
    part,
    part_high,
    part_total,
    sink,
    freqs,
    positions,
    out,
    ps,
    ts,
    splits,
    H: tl.constexpr,
    C: tl.constexpr,
    R: tl.constexpr,
    P: tl.constexpr,
    S: tl.constexpr,
):
    """Program (token, head): the sum of its splits, the sink, the inverse rotation."""
    t = tl.program_id(0)
    head = tl.program_id(1)
    split = tl.arange(0, S)
    at = (t.to(tl.int64) * splits + split) * H + head
    total = tl.load(part_total + at, mask=split < splits, other=0.0)
    high = tl.load(part_high + at, mask=split < splits, other=LOWEST)
    drain = tl.load(sink + head) * LOG2E
    highest = tl.maximum(tl.max(high, 0), drain)
    weight = tl.exp2(high - highest)
    share = weight / (tl.sum(weight * total, 0) + tl.exp2(drain - highest))
    c = tl.arange(0, P)
    there = (total > 0)[:, None] & (c < C)[None]
    x = tl.load(part + at[:, None] * C + c[None], mask=there, other=0.0)
    o = tl.sum(x * share[:, None], 0)[None]
    cos, sin = rotation(tl.load(positions + t), freqs, R)
    store(out, ps, ts, t, head + tl.arange(0, 1), rotate(o, cos, -sin, C, R), H, C)
