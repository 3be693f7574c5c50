"""Hyper-connections between two sublayers in two launches (specification 3.3, 3.11).

`post_mix` takes a sublayer's output into the streams and projects them; `finish` turns the
projections into the next sublayer's normed input and the next mix. A Mix is (post (T, 4),
comb (T, 16)), float32, comb[4 j + k] from stream j to stream k.

Between the two stand sums over slices of the channels, one row of COLUMNS a token and slice:
0-23 the projections, 24 the sum of squares, and of a small batch 32-47 the products of the streams
with each other. From those follows the norm of any weighted sum of streams, so that no program of
`finish` needs to see all channels, and a single token is finished on many processors.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from ds4.errors import BackendError

Mix = tuple[Tensor, Tensor]

STREAMS = tl.constexpr(4)
COLUMNS = tl.constexpr(64)
SQUARES = tl.constexpr(24)
PRODUCTS = tl.constexpr(32)
BLOCK = 32  # channels of a tile
SINGLE = 8  # tokens up to which each has its own programs, and no tensor cores
EARLY = False
FILL = 8192  # of the largest T at which a GPU is filled by splitting the channels further
SMALL = 32  # tokens up to which latency matters more than bytes


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
def _mix_one(
    h, y, y2, post, comb, fn, rows, out, partial,
    y_row, y2_row, D,
    FN: tl.constexpr, BD: tl.constexpr, EMBED: tl.constexpr, GATHER: tl.constexpr,
    SECOND: tl.constexpr, EARLY: tl.constexpr,
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
def _mix_many(
    h, y, y2, post, comb, fn, rows, out, partial,
    y_row, y2_row, D, T,
    FN: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr, STEPS: tl.constexpr,
    PRODUCE: tl.constexpr, EMBED: tl.constexpr, GATHER: tl.constexpr, SECOND: tl.constexpr,
    EARLY: tl.constexpr,
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
    column = row[None, :]
    tl.store(to_sums + column, acc, ok & (column < SQUARES))
    tl.store(to_sums + SQUARES, squares[:, None], ok)


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
def _finish(
    h, partial, scale, base, norm, x, post, comb,
    T, D, panel, token, eps, hc_eps,
    S: tl.constexpr, ROUNDS: tl.constexpr, SLICES: tl.constexpr, BD: tl.constexpr, BS: tl.constexpr,
    BT: tl.constexpr, MS: tl.constexpr, PRODUCE: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """The first programs make the mix of BT tokens each (none if ROUNDS is 0); each other one
    makes BD channels of a token's x. `panel` and `token` are strides of x in units of 8."""
    if EARLY:
        gdc_launch_dependents()
        gdc_wait()
    mixes = tl.cdiv(T, BT) if ROUNDS else 0
    program = tl.program_id(0)
    if program < mixes:
        _next_mix(
            partial, scale, base, post, comb, program * BT, T, D, eps, hc_eps,
            S, ROUNDS, BT, MS,
        )  # fmt: skip
        return
    t, d = (program - mixes) // SLICES, (program - mixes) % SLICES * BD + tl.arange(0, BD)
    ok = d < D
    at = h + t.to(tl.int64) * STREAMS * D + d
    h0, h1 = tl.load(at, ok, 0.0), tl.load(at + D, ok, 0.0)
    h2, h3 = tl.load(at + 2 * D, ok, 0.0), tl.load(at + 3 * D, ok, 0.0)
    weight = tl.load(norm + d, ok, 0.0)

    i, s = tl.arange(0, STREAMS * STREAMS), tl.arange(0, BS)
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
    r, factor = tl.rsqrt(squares / (STREAMS * D) + eps), tl.load(scale)
    left = _sigmoid(left * r * factor + tl.load(base + i // STREAMS)) + hc_eps
    right = _sigmoid(right * r * factor + tl.load(base + i % STREAMS)) + hc_eps
    y = tl.sum(tl.where(i == 0, left, 0.0), 0) * h0
    y += tl.sum(tl.where(i == 5, left, 0.0), 0) * h1
    y += tl.sum(tl.where(i == 10, left, 0.0), 0) * h2
    y += tl.sum(tl.where(i == 15, left, 0.0), 0) * h3
    size = tl.sum(left * right * products, 0) if PRODUCE else tl.sum(y * y, 0)
    y *= tl.rsqrt(size / D + eps) * weight
    y = tl.minimum(tl.maximum(y, -65504.0), 65504.0).to(tl.float16)
    tl.store(x + ((d // 8).to(tl.int64) * panel + t.to(tl.int64) * token) * 8 + d % 8, y, ok)


def pieces(tokens: int, width: int) -> int:
    """Slices of the channels whose sums `post_mix` leaves for `finish`."""
    if width % BLOCK:
        raise BackendError(f"hidden_size {width} is no multiple of {BLOCK}: use --device cpu")
    blocks = width // BLOCK
    if tokens <= SMALL:
        return blocks if tokens > SINGLE or blocks % 2 else blocks // 2
    wanted = triton.next_power_of_2(max(8, 2 * FILL // tokens))
    while blocks % wanted:
        wanted //= 2
    return wanted


def post_mix(
    h: Tensor,
    y: Tensor,
    mix: Mix,
    fn: Tensor,
    *,
    y2: Tensor | None = None,
    rows: Tensor | None = None,
    out: Tensor | None = None,
    partial: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """A sublayer's output into the streams, and what `finish` needs of the new ones.

    h (T, 4, D), contiguous, and mix as `finish` gave them; the output is y, or y + y2: (T, D) with
    any row stride; fn (24 or 4, 4 D). All are float32. With `rows` (R,) int32 only these tokens are
    made, in that order. Returns streams (R or T, 4, D) and sums (R or T, pieces, 64); `out` may
    be h if `rows` is None.
    """
    _, streams, width = h.shape
    if streams != STREAMS.value:
        raise BackendError(f"hc_mult is {streams}, but the GPU kernels are made for 4")
    tokens = len(h) if rows is None else len(rows)
    out = h.new_empty(tokens, streams, width) if out is None else out
    partial = _sums(h, tokens, width) if partial is None else partial
    second = y if y2 is None else y2
    strides = (y.stride(0), second.stride(0))
    pointers = (h, y, second, *mix, fn, h if rows is None else rows, out, partial)
    flags = {"EMBED": False, "GATHER": rows is not None, "SECOND": y2 is not None}
    _launch_mix(pointers, strides, tokens, width, len(fn), flags)
    return out, partial


def embed_mix(
    table: Tensor,
    tokens: Tensor,
    fn: Tensor,
    *,
    out: Tensor | None = None,
    partial: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """As post_mix, for the first sublayer: each stream is the token's row of table (V, D), of any
    float type; tokens (T,) int32."""
    count, width = len(tokens), table.shape[1]
    out = fn.new_empty(count, STREAMS.value, width) if out is None else out
    partial = _sums(fn, count, width) if partial is None else partial
    pointers = (table, fn, fn, fn, fn, fn, tokens, out, partial)
    flags = {"EMBED": True, "GATHER": True, "SECOND": False}
    _launch_mix(pointers, (0, 0), count, width, len(fn), flags)
    return out, partial


def _sums(like: Tensor, tokens: int, width: int) -> Tensor:
    return torch.empty(tokens, pieces(tokens, width), COLUMNS.value, device=like.device)


def _launch_mix(
    pointers: tuple[Tensor, ...],
    strides: tuple[int, int],
    tokens: int,
    width: int,
    fn_rows: int,
    flags: dict[str, bool],
) -> None:
    slices = pieces(tokens, width)
    if tokens <= SINGLE:
        channels = width // slices
        _mix_one[slices, tokens](
            *pointers,
            *strides,
            width,
            FN=fn_rows,
            BD=channels,
            **flags,
            EARLY=EARLY,
            num_warps=channels // 8,
            launch_pdl=EARLY,
        )
        return
    small = tokens <= SMALL
    block, channels = (16, BLOCK) if small else (32, BLOCK // 2)
    _mix_many[slices, triton.cdiv(tokens, block)](
        *pointers, *strides, width, tokens, FN=fn_rows, BT=block, BD=channels,
        STEPS=width // slices // channels, PRODUCE=small, **flags, EARLY=EARLY, num_warps=4 if small else 2, num_stages=2,
        launch_pdl=EARLY,
    )  # fmt: skip


def finish(
    h: Tensor,
    partial: Tensor,
    scale: Tensor,
    base: Tensor,
    norm: Tensor,
    x: Tensor,
    strides: tuple[int, int],
    *,
    eps: float,
    hc_eps: float,
    rounds: int,
    mix: Mix | None = None,
) -> Mix | None:
    """Streams h (T, 4, D) and their sums -> a sublayer's input in x, float16, and its mix.

    x has room for T tokens; `strides` are (ps, ts): channel k of token t is at
    k // 8 * ps + t * ts + k % 8, both multiples of 8. scale (3,), base (24,) and norm (D,) are
    float32. `rounds` are the column normalisations of Sinkhorn; 0 is the head, with scale (1,) and
    base (4,), which has no mix.
    """
    tokens, streams, width = h.shape
    slices_in = partial.shape[1]
    small = tokens <= SMALL
    if rounds and mix is None:
        mix = h.new_empty(tokens, streams), h.new_empty(tokens, streams * streams)
    block = min(512 if small else width, triton.next_power_of_2(width))
    block = triton.next_power_of_2(block)
    slices = triton.cdiv(width, block)
    together = 1 if small else 32
    programs = tokens * slices + (triton.cdiv(tokens, together) if rounds else 0)
    seen = triton.next_power_of_2(slices_in)
    _finish[(programs,)](
        h, partial, scale, base, norm, x, *(mix or (h, h)),
        tokens, width, strides[0] // 8, strides[1] // 8, eps, hc_eps,
        S=slices_in, ROUNDS=rounds, SLICES=slices, BD=block, BS=seen, BT=together,
        MS=min(seen, 128 // together), PRODUCE=small, EARLY=EARLY, num_warps=4 if small else 8,
        launch_pdl=EARLY,
    )  # fmt: skip
    return mix


def head(
    h: Tensor,
    y: Tensor,
    mix: Mix,
    fn: Tensor,
    scale: Tensor,
    base: Tensor,
    norm: Tensor,
    rows: Tensor,
    x: Tensor,
    strides: tuple[int, int],
    *,
    eps: float,
    hc_eps: float,
    y2: Tensor | None = None,
) -> None:
    """The last sublayer's output -> normed input x of the head, for the R tokens of `rows`.

    As post_mix and finish; fn (4, 4 D), scale (1,), base (4,).
    """
    streams, partial = post_mix(h, y, mix, fn, y2=y2, rows=rows)
    finish(streams, partial, scale, base, norm, x, strides, eps=eps, hc_eps=hc_eps, rounds=0)
