"""The second of two launches between sublayers: the next input, normed, and the next mix."""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from .hyper_mix import COLUMNS, PRODUCTS, SQUARES, STREAMS


@triton.jit
def _sigmoid(x):
    e = tl.exp(-tl.abs(x))
    return tl.where(x >= 0, 1.0, e) / (1 + e)


@triton.jit
def _share(a, b, c, d, eps):
    r = tl.rsqrt((a + b) + ((c + d) + eps))  # twice is sooner there than a division
    r *= r
    return a * r, b * r, c * r, d * r


@triton.jit
def _soft(a, b, c, d, eps):
    most = tl.maximum(tl.maximum(a, b), tl.maximum(c, d))
    a, b, c, d = _share(tl.exp(a - most), tl.exp(b - most), tl.exp(c - most), tl.exp(d - most), 0.0)
    return a + eps, b + eps, c + eps, d + eps


@triton.jit
def _column(m, i):
    """Column i of a (tokens, 32) tile."""
    return tl.sum(tl.where(tl.arange(0, 32)[None, :] == i, m, 0.0), 1)


@triton.jit
def _next_mix(
    partial, scale, base, post, comb, first, T, D, eps, hc_eps,
    S: tl.constexpr, ROUNDS: tl.constexpr, BT: tl.constexpr, BS: tl.constexpr,
):  # fmt: skip
    """post and comb of BT tokens. The 16 entries are kept apart: no step of Sinkhorn then waits
    for another thread."""
    t, i = first + tl.arange(0, BT), tl.arange(0, 32)
    m = tl.full((BT, 32), 0, tl.float32)
    for start in range(0, S, BS):
        s = start + tl.arange(0, BS)
        at = (t[:, None, None] * S + s[None, :, None]) * COLUMNS + i[None, None, :]
        ok = (t < T)[:, None, None] & (s < S)[None, :, None]
        m += tl.sum(tl.load(partial + at, ok, 0.0), 1)
    m *= tl.rsqrt(_column(m, SQUARES) / (STREAMS * D) + eps)[:, None]
    used = i < SQUARES
    factor = tl.load(scale + tl.where(i < 2 * STREAMS, 1, 2))
    m = m * factor[None, :] + tl.load(base + i, used, 0.0)[None, :]
    of_post = (t < T)[:, None] & ((i >= STREAMS) & (i < 2 * STREAMS))[None, :]
    tl.store(post + (t[:, None] - 1) * STREAMS + i[None, :], 2 * _sigmoid(m), of_post)

    c00, c01, c02, c03 = _soft(_column(m, 8), _column(m, 9), _column(m, 10), _column(m, 11), hc_eps)
    c10, c11, c12, c13 = _soft(
        _column(m, 12), _column(m, 13), _column(m, 14), _column(m, 15), hc_eps
    )
    c20, c21, c22, c23 = _soft(
        _column(m, 16), _column(m, 17), _column(m, 18), _column(m, 19), hc_eps
    )
    c30, c31, c32, c33 = _soft(
        _column(m, 20), _column(m, 21), _column(m, 22), _column(m, 23), hc_eps
    )
    c00, c10, c20, c30 = _share(c00, c10, c20, c30, hc_eps)
    c01, c11, c21, c31 = _share(c01, c11, c21, c31, hc_eps)
    c02, c12, c22, c32 = _share(c02, c12, c22, c32, hc_eps)
    c03, c13, c23, c33 = _share(c03, c13, c23, c33, hc_eps)
    for _ in range(ROUNDS - 1):
        c00, c01, c02, c03 = _share(c00, c01, c02, c03, hc_eps)
        c10, c11, c12, c13 = _share(c10, c11, c12, c13, hc_eps)
        c20, c21, c22, c23 = _share(c20, c21, c22, c23, hc_eps)
        c30, c31, c32, c33 = _share(c30, c31, c32, c33, hc_eps)
        c00, c10, c20, c30 = _share(c00, c10, c20, c30, hc_eps)
        c01, c11, c21, c31 = _share(c01, c11, c21, c31, hc_eps)
        c02, c12, c22, c32 = _share(c02, c12, c22, c32, hc_eps)
        c03, c13, c23, c33 = _share(c03, c13, c23, c33, hc_eps)
    to = comb + t * STREAMS * STREAMS
    _store_row(to, t < T, c00, c01, c02, c03)
    _store_row(to + 4, t < T, c10, c11, c12, c13)
    _store_row(to + 8, t < T, c20, c21, c22, c23)
    _store_row(to + 12, t < T, c30, c31, c32, c33)


@triton.jit
def _store_row(to, ok, a, b, c, d):
    tl.store(to, a, ok)
    tl.store(to + 1, b, ok)
    tl.store(to + 2, c, ok)
    tl.store(to + 3, d, ok)


@triton.jit
def _add3(a0, a1, a2, b0, b1, b2):
    return a0 + b0, a1 + b1, a2 + b2


@triton.jit
def finish_kernel(
    h, partial, scale, base, norm, x, post, comb,
    T, D, panel, token, eps, hc_eps,
    S: tl.constexpr, ROUNDS: tl.constexpr, SLICES: tl.constexpr, BD: tl.constexpr, BS: tl.constexpr,
    BT: tl.constexpr, MS: tl.constexpr, PRODUCE: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """The first programs make the mix of BT tokens each (none if ROUNDS is 0); each other one
    makes BD channels of a token's x. `panel` and `token` are strides of x in units of 8."""
    mixes = tl.cdiv(T, BT) if ROUNDS else 0
    program = tl.program_id(0)
    if EARLY:
        gdc_launch_dependents()
    if program < mixes:
        if EARLY:
            gdc_wait()
        _next_mix(
            partial, scale, base, post, comb, program * BT, T, D, eps, hc_eps,
            S, ROUNDS, BT, MS,
        )  # fmt: skip
        return
    t, d = (program - mixes) // SLICES, (program - mixes) % SLICES * BD + tl.arange(0, BD)
    ok = d < D
    weight = tl.load(norm + d, ok, 0.0)
    i, s = tl.arange(0, STREAMS * STREAMS), tl.arange(0, BS)
    factor, base_left = tl.load(scale), tl.load(base + i // STREAMS)
    base_right = tl.load(base + i % STREAMS)
    if EARLY:
        gdc_wait()
    at = h + t.to(tl.int64) * STREAMS * D + d
    h0, h1 = tl.load(at, ok, 0.0), tl.load(at + D, ok, 0.0)
    h2, h3 = tl.load(at + 2 * D, ok, 0.0), tl.load(at + 3 * D, ok, 0.0)

    sums = partial + (t * S + s[:, None]) * COLUMNS
    there = (s < S)[:, None]
    third = PRODUCTS + i if PRODUCE else SQUARES + i * 0
    left, right, products = tl.reduce(
        (
            tl.load(sums + (i // STREAMS)[None, :], there, 0.0),
            tl.load(sums + (i % STREAMS)[None, :], there, 0.0),
            tl.load(sums + third[None, :], there, 0.0),
        ),
        0,
        _add3,
    )
    diagonal = i % (STREAMS + 1) == 0
    squares = tl.sum(tl.where(diagonal if PRODUCE else i == 0, products, 0.0), 0)
    r = tl.rsqrt(squares / (STREAMS * D) + eps)
    left = _sigmoid(left * r * factor + base_left) + hc_eps
    right = _sigmoid(right * r * factor + base_right) + hc_eps
    y = tl.sum(tl.where(i == 0, left, 0.0), 0) * h0
    y += tl.sum(tl.where(i == 5, left, 0.0), 0) * h1
    y += tl.sum(tl.where(i == 10, left, 0.0), 0) * h2
    y += tl.sum(tl.where(i == 15, left, 0.0), 0) * h3
    size = tl.maximum(tl.sum(left * right * products, 0), 0.0) if PRODUCE else tl.sum(y * y, 0)
    y *= tl.rsqrt(size / D + eps) * weight
    y = tl.minimum(tl.maximum(y, -65504.0), 65504.0).to(tl.float16)
    tl.store(x + ((d // 8).to(tl.int64) * panel + t.to(tl.int64) * token) * 8 + d % 8, y, ok)
