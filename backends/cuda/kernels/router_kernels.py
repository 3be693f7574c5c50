"""Kernels of the router: scores and choice, and the order of the pairs (router.py)."""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

TILE = tl.constexpr(8)  # pairs of one expert that a small tile holds


@triton.jit
def _score(z):
    """sqrt(softplus(z)); log1p by its series in e / (2 + e), which is at most 1/3."""
    e = tl.exp(-tl.abs(z))
    s = e / (2 + e)
    q = s * s
    series = 1 / 13 + q * (1 / 15 + q * (1 / 17))
    series = 1 + q * (1 / 3 + q * (1 / 5 + q * (1 / 7 + q * (1 / 9 + q * (1 / 11 + q * series)))))
    return tl.sqrt(tl.maximum(z, 0.0) + 2 * s * series)


@triton.jit
def _bias_row(bias, E: tl.constexpr, EP: tl.constexpr):
    e = tl.arange(0, EP)[None, :]
    return tl.load(bias + e, e < E, 0.0)


@triton.jit
def _choose(
    z, z_row, bias, table, tokens, ids, weights, factor, first, T,
    E: tl.constexpr, EP: tl.constexpr, K: tl.constexpr, KP: tl.constexpr, BT: tl.constexpr,
    HASH: tl.constexpr,
):  # fmt: skip
    """Ids and weights of BT tokens; `bias` is a row of EP."""
    t = first + tl.arange(0, BT)
    row = z + t.to(tl.int64)[:, None] * z_row
    if HASH:
        pick = tl.arange(0, KP)[None, :]
        ok = (t < T)[:, None] & (pick < K)
        token = tl.load(tokens + t, t < T, 0).to(tl.int64)
        chosen = tl.load(table + token[:, None] * K + pick, ok, 0).to(tl.int32)
        score = tl.where(ok, _score(tl.load(row + chosen, ok, 0.0)), 0.0)
        total = tl.sum(score, 1) + 1e-20
    else:
        chosen = tl.arange(0, EP)[None, :] + tl.full((BT, EP), 0, tl.int32)
        ok = (t < T)[:, None] & (chosen < E)
        score = _score(tl.load(row + chosen, ok, 0.0))
        order = (score + bias).to(tl.int32, bitcast=True)
        order = tl.where(order < 0, order ^ 0x7FFFFFFF, order)  # integers sort as the floats do
        order = tl.where(chosen < E, order, -0x80000000)
        pick = tl.full((BT, EP), K, tl.int32)
        for i in tl.static_range(K):
            most = tl.max(order, 1)[:, None]
            which = tl.min(tl.where(order == most, chosen, EP), 1)[:, None]
            pick = tl.where(chosen == which, i, pick)
            order = tl.where(chosen == which, -0x80000000, order)
        ok = (t < T)[:, None] & (pick < K)
        total = tl.sum(tl.where(ok, score, 0.0), 1) + 1e-20
    at = t[:, None] * K + pick
    tl.store(ids + at, chosen, ok)
    tl.store(weights + at, score / total[:, None] * factor, ok)


@triton.jit
def _pair_expert(
    ids, pos, held, pair, P,
    K: tl.constexpr, E: tl.constexpr, PADDED: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """The expert of a pair; E for pairs that are none, or another rank's."""
    ok = pair < P
    if PADDED:
        ok &= tl.load(pos + pair // K, ok, -1) >= 0
    e = tl.load(ids + pair, ok, 0)
    if SPLIT:
        ok &= tl.load(held + e, ok, 0) != 0
    return tl.where(ok, e, E)


@triton.jit
def route_small_kernel(
    z, z_row, bias, table, tokens, pos, held, ids, weights, tile_expert, tile_count, tile_pairs,
    hits, factor, T,
    E: tl.constexpr, EP: tl.constexpr, K: tl.constexpr, KP: tl.constexpr, BT: tl.constexpr,
    BP: tl.constexpr, STEP: tl.constexpr, HASH: tl.constexpr, PADDED: tl.constexpr,
    SPLIT: tl.constexpr, COUNT: tl.constexpr, CHOOSE: tl.constexpr, ORDER: tl.constexpr,
    HOLDS: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """Choose, then build the tiles: each pair counts its equals and the tiles before its own.

    ORDER needs one program, and the ids of all tokens. A tile holds up to HOLDS pairs.
    """
    of_bias = tl.full((1, EP), 0, tl.float32)
    if CHOOSE and not HASH:
        of_bias = _bias_row(bias, E, EP)
    if EARLY:
        gdc_launch_dependents()
        gdc_wait()
    if CHOOSE:
        start = tl.program_id(0) * BT
        _choose(
            z, z_row, of_bias, table, tokens, ids, weights, factor, start, T,
            E, EP, K, KP, BT, HASH,
        )  # fmt: skip
    if not ORDER:
        return
    tl.debug_barrier()  # ids are read by other threads than wrote them
    P, pair = T * K, tl.arange(0, BP)
    e = _pair_expert(ids, pos, held, pair, P, K, E, PADDED, SPLIT)
    before, equal = tl.full((BP,), 0, tl.int32), tl.full((BP,), 0, tl.int32)
    for start in range(0, BP, STEP):
        other = start + tl.arange(0, STEP)
        same = e[:, None] == tl.gather(e, other, 0)[None, :]
        equal += tl.sum(same.to(tl.int32), 1)
        before += tl.sum((same & (other[None, :] < pair[:, None])).to(tl.int32), 1)
    tile, used = before // HOLDS, tl.full((), 0, tl.int32)
    first = tl.where(before % HOLDS == 0, e, E)  # of the pairs that begin a tile, the expert
    for start in range(0, BP, STEP):
        of_other = tl.gather(first, start + tl.arange(0, STEP), 0)
        tile += tl.sum((of_other[None, :] < e[:, None]).to(tl.int32), 1)
        used += tl.sum((of_other < E).to(tl.int32), 0)
    ok = e < E
    tl.store(tile_pairs + tile * TILE + before % HOLDS, pair, ok)
    leads = ok & (before % HOLDS == 0)
    count = tl.minimum(equal - before, HOLDS)
    tl.store(tile_expert + tile, e, leads)
    tl.store(tile_count + tile, count, leads)
    idle = (pair >= used) & (pair < P)
    tl.store(tile_expert + pair, 0, idle)
    tl.store(tile_count + pair, 0, idle)
    if COUNT:
        tl.atomic_add(hits + e, count.to(tl.int64), leads, sem="relaxed")


@triton.jit
def choose_and_count(
    z, z_row, bias, table, tokens, pos, held, ids, weights, counts, factor, T,
    E: tl.constexpr, EP: tl.constexpr, K: tl.constexpr, KP: tl.constexpr, BT: tl.constexpr,
    BP: tl.constexpr, HASH: tl.constexpr, PADDED: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """Choose for BT tokens, and count their pairs by expert."""
    first = tl.program_id(0) * BT
    of_bias = tl.full((1, EP), 0, tl.float32)
    if not HASH:
        of_bias = _bias_row(bias, E, EP)
    _choose(
        z, z_row, of_bias, table, tokens, ids, weights, factor, first, T, E, EP, K, KP, BT, HASH
    )
    tl.debug_barrier()
    pair = tl.arange(0, BP)
    end = tl.minimum(first + BT, T) * K
    e = _pair_expert(ids, pos, held, first * K + pair, end, K, E, PADDED, SPLIT)
    counted = tl.histogram(e, EP, mask=e < E)
    tl.store(counts + tl.program_id(0) * EP + tl.arange(0, EP), counted)


@triton.jit
def add_up(
    counts, totals, hits, N,
    EP: tl.constexpr, BE: tl.constexpr, BN: tl.constexpr, E: tl.constexpr, COUNT: tl.constexpr,
):  # fmt: skip
    """counts (N, EP) -> for BE experts, the sum of the rows above, in place, and of all."""
    e = tl.program_id(0) * BE + tl.arange(0, BE)
    total = tl.full((BE,), 0, tl.int32)
    start = 0
    while start < N:
        n = start + tl.arange(0, BN)[:, None]
        at, ok = counts + n * EP + e[None, :], n < N
        counted = tl.load(at, ok, 0)
        tl.store(at, tl.cumsum(counted, 0) - counted + total[None, :], ok)
        total += tl.sum(counted, 0)
        start += BN
    tl.store(totals + e, total)
    if COUNT:
        tl.store(hits + e, tl.load(hits + e, e < E, 0) + total, e < E)


@triton.jit
def sort_pairs(
    ids, pos, held, counts, totals, pairs, offsets, tile_expert, tile_row, T, N, tiles,
    E: tl.constexpr, EP: tl.constexpr, K: tl.constexpr, BT: tl.constexpr, BP: tl.constexpr,
    STEP: tl.constexpr, ROWS: tl.constexpr, PADDED: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """The first N programs place the pairs of BT tokens each; the others name BP tiles each."""
    program, every = tl.program_id(0), tl.arange(0, EP)
    total = tl.load(totals + every)
    start = tl.cumsum(total, 0) - total
    if program < N:
        first, end = program * BT * K, tl.minimum(program * BT + BT, T) * K
        pair = first + tl.arange(0, BP)
        e = _pair_expert(ids, pos, held, pair, end, K, E, PADDED, SPLIT)
        before = tl.full((BP,), 0, tl.int32)
        for offset in range(0, BP, STEP):
            other = offset + tl.arange(0, STEP)
            same = e[:, None] == tl.gather(e, other, 0)[None, :]
            same &= other[None, :] < (pair - first)[:, None]
            before += tl.sum(same.to(tl.int32), 1)
        ok = e < E
        at = tl.gather(start, tl.where(ok, e, 0), 0) + before
        tl.store(pairs + at + tl.load(counts + program * EP + e, ok, 0), pair, ok)
        tl.store(offsets + every, start, every <= tl.where(program == 0, E, -1))
        if EP == E:
            tl.store(offsets + E, tl.sum(total, 0), program == 0)
    else:
        tile = (program - N) * BP + tl.arange(0, BP)
        here = tl.cdiv(total, ROWS)
        tiles_to = tl.cumsum(here, 0)
        e = tl.full((BP,), 0, tl.int32)
        for offset in range(0, EP, STEP):
            # experts whose tiles all come before this one
            some = offset + tl.arange(0, STEP)
            e += tl.sum((tl.gather(tiles_to, some, 0)[None, :] <= tile[:, None]).to(tl.int32), 1)
        there = e < E
        e = tl.where(there, e, 0)
        row = tl.gather(start, e, 0) + (tile - tl.gather(tiles_to - here, e, 0)) * ROWS
        tl.store(tile_expert + tile, tl.where(there, e, -1), tile < tiles)
        tl.store(tile_row + tile, tl.where(there, row, 0), tile < tiles)
