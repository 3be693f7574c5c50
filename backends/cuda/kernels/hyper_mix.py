"""The first of two launches between sublayers: new streams, their projections and sums.

What the next one needs of a token is a row of COLUMNS numbers for each slice of the channels: 0-23
the projections, 24 the sum of squares, and of a small batch 32-47 the products of the streams with
each other. From those follows the norm of any weighted sum of streams.

EARLY kernels start while the one before them in the stream still runs, and wait for it where they
first read what it wrote.
"""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

STREAMS = tl.constexpr(4)
COLUMNS = tl.constexpr(64)
SQUARES = tl.constexpr(24)
PRODUCTS = tl.constexpr(32)


@triton.jit
def _shares(post, comb, t, k):
    """What new stream k of token t takes: of the output, and of each old stream."""
    of = comb + t * STREAMS * STREAMS + k
    p = tl.load(post + t * STREAMS + k)
    return p, tl.load(of), tl.load(of + 4), tl.load(of + 8), tl.load(of + 12)


@triton.jit
def _pick(tile, i):
    """Column i of a tile, as a tile of one column: no thread waits for another warp."""
    column = tl.arange(0, tile.shape[1])[None, :]
    return tl.sum(tl.where(column == i, tile, 0.0), 1)[:, None]


@triton.jit
def _picked(p, c, k):
    return _pick(p, k), _pick(c, k), _pick(c, 4 + k), _pick(c, 8 + k), _pick(c, 12 + k)


@triton.jit
def _mixed(y, h0, h1, h2, h3, share):
    return share[0] * y + share[1] * h0 + share[2] * h1 + share[3] * h2 + share[4] * h3


@triton.jit
def mix_one(
    h, y, y2, post, comb, fn, rows, out, partial,
    y_row, y2_row, D,
    FN: tl.constexpr, BD: tl.constexpr, EMBED: tl.constexpr, GATHER: tl.constexpr,
    SECOND: tl.constexpr, PARTS: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """One token, BD channels. A row of each tile is a row of fn; the streams are in every row, so
    that nothing moves between threads before the sums."""
    if EARLY:
        gdc_launch_dependents()
    piece, r = tl.program_id(0), tl.program_id(1)
    row, d = tl.arange(0, 32)[:, None], piece * BD + tl.arange(0, BD)[None, :]
    of_fn = row * STREAMS * D + d
    f0 = tl.load(fn + of_fn, row < FN, 0.0)
    f1 = tl.load(fn + of_fn + D, row < FN, 0.0)
    f2 = tl.load(fn + of_fn + 2 * D, row < FN, 0.0)
    f3 = tl.load(fn + of_fn + 3 * D, row < FN, 0.0)
    if EARLY:
        gdc_wait()
    t = tl.load(rows + r).to(tl.int64) if GATHER else r.to(tl.int64)
    wide = d + row * 0
    if EMBED:
        n0 = tl.load(h + t * D + wide).to(tl.float32)
        n1, n2, n3 = n0, n0, n0
    else:
        at = h + t * STREAMS * D + wide
        h0, h1, h2, h3 = tl.load(at), tl.load(at + D), tl.load(at + 2 * D), tl.load(at + 3 * D)
        v = tl.load(y + t * y_row + wide)
        for part in tl.static_range(1, PARTS):
            v += tl.load(y + t * y_row + part * D + wide)
        if SECOND:
            v += tl.load(y2 + t * y2_row + wide)
        n0 = _mixed(v, h0, h1, h2, h3, _shares(post, comb, t, 0))
        n1 = _mixed(v, h0, h1, h2, h3, _shares(post, comb, t, 1))
        n2 = _mixed(v, h0, h1, h2, h3, _shares(post, comb, t, 2))
        n3 = _mixed(v, h0, h1, h2, h3, _shares(post, comb, t, 3))
    to = out + r.to(tl.int64) * STREAMS * D + wide
    tl.store(to, n0, row == 0)
    tl.store(to + D, n1, row == 1)
    tl.store(to + 2 * D, n2, row == 2)
    tl.store(to + 3 * D, n3, row == 3)
    projected = tl.sum(f0 * n0 + f1 * n1 + f2 * n2 + f3 * n3, 1)
    left, right = row // STREAMS, row % STREAMS
    of_left = tl.where(left == 0, n0, tl.where(left == 1, n1, tl.where(left == 2, n2, n3)))
    of_right = tl.where(right == 0, n0, tl.where(right == 1, n1, tl.where(right == 2, n2, n3)))
    products = tl.sum(of_left * of_right, 1)
    squares = tl.sum(n0 * n0 + n1 * n1 + n2 * n2 + n3 * n3, 1)
    column = tl.arange(0, 32)
    to_sums = partial + (r * tl.num_programs(0) + piece) * COLUMNS + column
    tl.store(to_sums, tl.where(column == SQUARES, squares, projected))
    tl.store(to_sums + PRODUCTS, products, column < STREAMS * STREAMS)


@triton.jit
def mix_many(
    h, y, y2, post, comb, fn, rows, out, partial,
    y_row, y2_row, D, T,
    FN: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr, STEPS: tl.constexpr,
    PRODUCE: tl.constexpr, EMBED: tl.constexpr, GATHER: tl.constexpr, SECOND: tl.constexpr,
    PARTS: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """BT tokens, STEPS * BD channels; the projections on tensor cores, in three TF32 products."""
    if EARLY:
        gdc_launch_dependents()
        gdc_wait()
    piece, r = tl.program_id(0), tl.program_id(1) * BT + tl.arange(0, BT)
    ok = (r < T)[:, None]
    t = tl.load(rows + r, r < T, 0) if GATHER else tl.minimum(r, T - 1)
    t, r64 = t.to(tl.int64)[:, None], r.to(tl.int64)[:, None]
    if not EMBED:
        i = tl.arange(0, BD)[None, :]
        p = tl.load(post + t * STREAMS + i, i < STREAMS, 0.0)
        c = tl.load(comb + t * STREAMS * STREAMS + i, i < STREAMS * STREAMS, 0.0)
        share0, share1, share2, share3 = (
            _picked(p, c, 0),
            _picked(p, c, 1),
            _picked(p, c, 2),
            _picked(p, c, 3),
        )
    row = tl.arange(0, 32)
    acc = tl.full((BT, 32), 0, tl.float32)
    squares = tl.full((BT,), 0, tl.float32)
    to_sums = partial + (r64 * tl.num_programs(0) + piece) * COLUMNS
    for step in range(STEPS):
        d = (piece * STEPS + step) * BD + tl.arange(0, BD)[None, :]
        of_fn = row[:, None] * STREAMS * D + d
        if EMBED:
            n0 = tl.load(h + t * D + d).to(tl.float32)
            n1, n2, n3 = n0, n0, n0
        else:
            at = h + t * STREAMS * D + d
            h0, h1 = tl.load(at), tl.load(at + D)
            h2, h3 = tl.load(at + 2 * D), tl.load(at + 3 * D)
            v = tl.load(y + t * y_row + d)
            for part in tl.static_range(1, PARTS):
                v += tl.load(y + t * y_row + part * D + d)
            if SECOND:
                v += tl.load(y2 + t * y2_row + d)
            n0, n1 = _mixed(v, h0, h1, h2, h3, share0), _mixed(v, h0, h1, h2, h3, share1)
            n2, n3 = _mixed(v, h0, h1, h2, h3, share2), _mixed(v, h0, h1, h2, h3, share3)
        to = out + r64 * STREAMS * D + d
        tl.store(to, n0, ok)
        tl.store(to + D, n1, ok)
        tl.store(to + 2 * D, n2, ok)
        tl.store(to + 3 * D, n3, ok)
        has = row[:, None] < FN
        acc = tl.dot(n0, tl.load(fn + of_fn, has, 0.0).T, acc, input_precision="tf32x3")
        acc = tl.dot(n1, tl.load(fn + of_fn + D, has, 0.0).T, acc, input_precision="tf32x3")
        acc = tl.dot(n2, tl.load(fn + of_fn + 2 * D, has, 0.0).T, acc, input_precision="tf32x3")
        acc = tl.dot(n3, tl.load(fn + of_fn + 3 * D, has, 0.0).T, acc, input_precision="tf32x3")
        squares += tl.sum(n0 * n0 + n1 * n1 + n2 * n2 + n3 * n3, 1)
        if PRODUCE:  # then STEPS is 1
            _store_products(to_sums + PRODUCTS, ok, n0, n1, n2, n3)
    column = row[None, :]  # all are stored, as `finish` reads all of them
    tl.store(to_sums + column, tl.where(column == SQUARES, squares[:, None], acc), ok)


@triton.jit
def _store_products(to, ok, n0, n1, n2, n3):
    _store_pair(to, ok, n0, n0, 0, 0)
    _store_pair(to, ok, n0, n1, 0, 1)
    _store_pair(to, ok, n0, n2, 0, 2)
    _store_pair(to, ok, n0, n3, 0, 3)
    _store_pair(to, ok, n1, n1, 1, 1)
    _store_pair(to, ok, n1, n2, 1, 2)
    _store_pair(to, ok, n1, n3, 1, 3)
    _store_pair(to, ok, n2, n2, 2, 2)
    _store_pair(to, ok, n2, n3, 2, 3)
    _store_pair(to, ok, n3, n3, 3, 3)


@triton.jit
def _store_pair(to, ok, a, b, j: tl.constexpr, k: tl.constexpr):
    product = tl.sum(a * b, 1)[:, None]
    tl.store(to + STREAMS * j + k, product, ok)
    if j != k:
        tl.store(to + STREAMS * k + j, product, ok)
