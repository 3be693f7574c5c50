"""Device functions of sparse attention: rotations, the query, and cached rows as matrix tiles.

A tile has P channels, the row's C rounded up to a power of two. The last R of the C are rotary, and
R divides C: as (C / R, R / 2, 2) the last group holds the pairs to rotate.
"""

import triton
import triton.language as tl

QUARTER = tl.constexpr(1.5707963267948966)  # of a turn
GROUP = tl.constexpr(64)  # channels of a packed row with one scale
MOST = tl.constexpr(65504.0)  # the largest fp16


@triton.jit
def rotation(pos, freqs, R: tl.constexpr):
    """cos and sin of pos * freqs, (R / 2,) float32 each.

    The angle is rounded to float32, as the model's definition has it, then brought within an
    eighth of a turn in float64: a million radians in float32 have no digits left for the rest.
    """
    freq = tl.load(freqs + tl.arange(0, R // 2))
    angle = (pos.to(tl.float32) * freq).to(tl.float64)
    quarters = tl.floor(angle * (1 / QUARTER) + 0.5)
    x = (angle - quarters * QUARTER).to(tl.float32)
    xx = x * x
    cos = 1 - 0.5 * xx + xx * xx * (4.16666456e-2 + xx * (-1.38873162e-3 + xx * 2.44331571e-5))
    sin = x + x * xx * (-1.66666546e-1 + xx * (8.33216087e-3 - xx * 1.95152959e-4))
    quarter = quarters.to(tl.int32)
    odd = (quarter & 1) == 1
    turned_cos = tl.where(odd, sin, cos)
    turned_sin = tl.where(odd, cos, sin)
    cos = tl.where(((quarter + 1) & 2) == 2, -turned_cos, turned_cos)
    return cos, tl.where((quarter & 2) == 2, -turned_sin, turned_sin)


@triton.jit
def rotate(x, cos, sin, C: tl.constexpr, R: tl.constexpr):
    """(rows, P): the last R of C channels turned, as interleaved pairs."""
    rows: tl.constexpr = x.shape[0]
    width: tl.constexpr = x.shape[1]
    a, b = tl.split(tl.reshape(x, (rows, width // R, R // 2, 2)))
    tail = (tl.arange(0, width // R) == C // R - 1)[None, :, None]
    cos = cos[None, None]
    sin = sin[None, None]
    turned_a = tl.where(tail, a * cos - b * sin, a)
    turned_b = tl.where(tail, a * sin + b * cos, b)
    return tl.reshape(tl.join(turned_a, turned_b), (rows, width))


@triton.jit
def query(
    q, heads, cos, sin, eps, H: tl.constexpr, C: tl.constexpr, R: tl.constexpr, P: tl.constexpr
):
    """Heads of one token's (H, C) float32 query, normed and rotated: (heads, P)."""
    c = tl.arange(0, P)
    there = (heads < H)[:, None] & (c < C)[None]
    x = tl.load(q + heads[:, None] * C + c[None], mask=there, other=0.0)
    norm = 1.0 / tl.sqrt(tl.sum(x * x, 1) / C + eps)
    return rotate(x * norm[:, None], cos, sin, C, R)


@triton.jit
def float_rows(plane, row, seen, C: tl.constexpr, P: tl.constexpr):
    """Rows of C float32 as (rows, P); zero where not `seen`, whatever memory holds."""
    c = tl.arange(0, P)
    there = seen[:, None] & (c < C)[None]
    return tl.load(plane + row[:, None] * C + c[None], mask=there, other=0.0)


@triton.jit
def packed_rows(
    codes,
    scales,
    tails,
    row,
    seen,
    SCALES: tl.constexpr,
    C: tl.constexpr,
    R: tl.constexpr,
    P: tl.constexpr,
):
    """The same of packed rows, in fp16: an e4m3 code times the power of two of its group of 64.

    Exact for a group whose largest value is at least 2^-7, and for every bf16 from 2^-14; below
    that the error is at most 2^-25, since fp16 reaches down to 2^-24. Rows were normed: values are
    around 1, and under sqrt(C) times the largest weight of the norm.
    """
    keys: tl.constexpr = row.shape[0]
    groups: tl.constexpr = P // GROUP
    plain: tl.constexpr = C - R
    g = tl.arange(0, groups)
    coded = seen[:, None] & (g < plain // GROUP)[None]
    power = tl.load(scales + row[:, None] * SCALES + g[None], mask=coded, other=0)
    power = (power.to(tl.int32) << 23).to(tl.float32, bitcast=True).to(tl.float16)
    c = g[:, None] * GROUP + tl.arange(0, GROUP)[None]
    at = row[:, None, None]
    code = tl.load(codes + at * plain + c[None], mask=coded[:, :, None], other=0)
    value = code.to(tl.float8e4nv, bitcast=True).to(tl.float16) * power[:, :, None]
    rotary = seen[:, None, None] & ((c >= plain) & (c < C))[None]
    tail = tl.load(tails + at * R + (c - plain)[None], mask=rotary, other=0.0)
    value = tl.where((c >= plain)[None], tail.to(tl.float32).to(tl.float16), value)
    return tl.reshape(value, (keys, P))


@triton.jit
def store(out, ps, ts, t, heads, x, H: tl.constexpr, C: tl.constexpr):
    """(heads, P) float32 into activations; `ps` and `ts` count groups of 8 channels."""
    c = tl.arange(0, x.shape[1])
    k = heads[:, None] * C + c[None]
    at = (k // 8).to(tl.int64) * (ps * 8) + t.to(tl.int64) * (ts * 8) + k % 8
    if out.dtype.element_ty == tl.float16:
        x = tl.minimum(tl.maximum(x, -MOST), MOST)
    tl.store(out + at, x.to(out.dtype.element_ty), mask=(heads < H)[:, None] & (c < C)[None])
