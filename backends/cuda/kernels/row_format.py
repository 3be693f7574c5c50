# mypy: disable-error-code="no-untyped-def,assignment"
"""Device functions of cache rows: rotation, Hadamard, rounding to e4m3, bf16 and FP4 bytes.

Rounding is done on integers: the same bits as ds4/quant/formats.py on every GPU (FP8 conversions
start with sm_89) and in Triton's interpreter, whose own conversions truncate.
"""

import triton
import triton.language as tl

TWO_PI = tl.constexpr(6.283185307179586)
TURN = tl.constexpr(0.15915494309189535)  # 1 / (2 pi)
FP4_FLOOR = tl.constexpr(6 * 2.0**-126)
KV_FLOOR = tl.constexpr(1e-4)


@triton.jit
def rotation(pos, freqs, C: tl.constexpr, R: tl.constexpr, B: tl.constexpr):
    """cos and sin for the pairs of C channels, (1, B / 2): 1 and 0 before the last R channels.

    The angle is rounded to float32, as the reference does, and then brought into half a turn in
    float64, where a million radians keep all their digits.
    """
    pair = tl.arange(0, B // 2)
    turning = (pair >= (C - R) // 2) & (pair < C // 2)
    freq = tl.load(freqs + pair - (C - R) // 2, mask=turning, other=0.0)
    angle = (pos.to(tl.float32) * freq).to(tl.float64)
    angle = (angle - tl.floor(angle * TURN + 0.5) * TWO_PI).to(tl.float32)[None]
    return tl.cos(angle), tl.sin(angle)


@triton.jit
def turned(x, cos, sin):
    """Neighbouring channels of x (N, B) rotated as pairs."""
    N: tl.constexpr = x.shape[0]
    B: tl.constexpr = x.shape[1]
    a, b = tl.split(tl.reshape(x, (N, B // 2, 2)))
    return tl.reshape(tl.join(a * cos - b * sin, a * sin + b * cos), (N, B))


@triton.jit
def norm_and_rotation(norm, pos, freqs, C: tl.constexpr, R: tl.constexpr, B: tl.constexpr):
    """What `finished` wants beside a row; loaded early, it is there when the row is."""
    c = tl.arange(0, B)
    weight = tl.load(norm + c, mask=c < C, other=0.0).to(tl.float32)[None]
    cos, sin = rotation(pos, freqs, C, R, B)
    return weight, cos, sin


@triton.jit
def finished(x, extras, C: tl.constexpr, eps):
    """A row, (1, B) with zeros beyond C channels: RMS norm, then rotation."""
    weight, cos, sin = extras
    mean = tl.sum(x * x, 1) / C
    return turned(x / tl.sqrt(mean + eps)[:, None] * weight, cos, sin)


@triton.jit
def exponent_above(largest, LOG: tl.constexpr, MANTISSA: tl.constexpr):
    """The smallest e with 2^e * top >= largest, for top = 2^LOG * 1.MANTISSA (a float's bits).

    `formats` rounds the quotient largest / top first; that never crosses a power of two.
    """
    bits = largest.to(tl.int32, bitcast=True)
    return (bits >> 23) - 127 - LOG + ((bits & 0x7FFFFF) > MANTISSA).to(tl.int32)


@triton.jit
def power_of_two(e):
    """2^e as float32, -126 <= e <= 127."""
    return ((e + 127) << 23).to(tl.float32, bitcast=True)


@triton.jit
def e4m3_codes(x):
    """Nearest e4m3 code of |x| <= 448, ties to the even one."""
    bits = x.to(tl.int32, bitcast=True)
    size = bits & 0x7FFFFFFF
    normal = ((size + 0x7FFFF + ((size >> 20) & 1)) >> 20) - (120 << 3)
    # Below 2^-6 the codes are 2^-9 apart, as the floats above 2^14 are.
    small = (size.to(tl.float32, bitcast=True) + 16384.0).to(tl.int32, bitcast=True)
    code = tl.where(size < (121 << 23), small & 15, normal)
    return (code & 127) | ((bits >> 24) & 128)


@triton.jit
def bf16_bits(x):
    """The nearest bfloat16, ties to even, as int16."""
    bits = x.to(tl.int32, bitcast=True)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return tl.where(x == x, rounded, 0x7FC0).to(tl.int16)


@triton.jit
def fp4_codes(x):
    """Nearest of 0, .5, 1, 1.5, 2, 3, 4, 6 for |x| <= 6, ties to the even code."""
    bits = x.to(tl.int32, bitcast=True)
    size = bits & 0x7FFFFFFF
    normal = ((size + 0x1FFFFF + ((size >> 22) & 1)) >> 22) - (126 << 1)
    # Below 1 the codes are 1/2 apart, as the floats above 2^22 are.
    small = (size.to(tl.float32, bitcast=True) + 4194304.0).to(tl.int32, bitcast=True)
    code = tl.where(size < (127 << 23), small & 3, normal)
    return (code & 7) | ((bits >> 28) & 8)


@triton.jit
def signs(i, j):
    """The Sylvester matrix's entry at (i, j), 1 or -1: the parity of the bits they share."""
    x = i & j
    x ^= x >> 8
    x ^= x >> 4
    x ^= x >> 2
    x ^= x >> 1
    return (1 - 2 * (x & 1)).to(tl.float32)


@triton.jit
def hadamard(x, N: tl.constexpr, C: tl.constexpr, A: tl.constexpr):
    """x (N, C) times the Hadamard matrix, as its two factors of A and C / A."""
    B: tl.constexpr = C // A
    a = tl.arange(0, A)
    b = tl.arange(0, B)
    x = tl.reshape(x, (N, A, B))
    x = tl.sum(x[:, :, :, None] * signs(b[:, None], b[None])[None, None], 2)
    x = tl.sum(x[:, :, None, :] * signs(a[:, None], a[None])[None, :, :, None], 1)
    return tl.reshape(x, (N, C)) * (1.0 / tl.sqrt(tl.full((1, 1), C, tl.float32)))


@triton.jit
def fp4_exponent(largest):
    """The exponent of a group's scale, from -126."""
    return exponent_above(tl.maximum(largest, FP4_FLOOR), 2, 0x400000)


@triton.jit
def fp4_groups(x, N: tl.constexpr, C: tl.constexpr):
    """x (N, C) -> codes (N, C / 32, 32) as int32 and exponents (N, C / 32), as formats.round_q4."""
    groups = tl.reshape(x, (N, C // 32, 32))
    e = fp4_exponent(tl.max(tl.abs(groups), 2))
    return fp4_codes(groups * power_of_two(-e)[:, :, None]), e


@triton.jit
def store_kv(
    into,
    row,
    x,
    C: tl.constexpr,
    R: tl.constexpr,
    B: tl.constexpr,
    SCALES: tl.constexpr,
    NATIVE: tl.constexpr,
):
    """Store x (1, B) as key-value row `row` of C channels; in exact mode the planes are float32."""
    codes, scales, tail = into
    c = tl.arange(0, B)
    if NATIVE:
        groups = tl.reshape(x, (B // 64, 64))
        largest = tl.maximum(tl.max(tl.abs(groups), 1), KV_FLOOR)
        e = exponent_above(largest, 8, 0x600000)
        code = tl.reshape(e4m3_codes(groups * power_of_two(-e)[:, None]), (B,))
        tl.store(codes + row * (C - R) + c, code.to(tl.uint8), mask=c < C - R)
        group = tl.arange(0, B // 64)
        there = group < (C - R) // 64
        tl.store(scales + row * SCALES + group, (e + 127).to(tl.uint8), mask=there)
        bits = bf16_bits(tl.reshape(x, (B,)))
        tl.store(tail + row * R + c - (C - R), bits, mask=(c >= C - R) & (c < C))
    else:
        tl.store(codes + row * C + c, tl.reshape(x, (B,)), mask=c < C)


@triton.jit
def store_index(
    codes, scales, row, x, C: tl.constexpr, A: tl.constexpr, B: tl.constexpr, NATIVE: tl.constexpr
):
    """Store x (1, B) as index row `row`; native: C = B, and A is a factor of C for `hadamard`."""
    c = tl.arange(0, B)
    if NATIVE:
        code, e = fp4_groups(hadamard(x, 1, C, A), 1, C)
        low, high = tl.split(tl.reshape(code, (C // 2, 2)))
        half = tl.arange(0, C // 2)
        tl.store(codes + row * (C // 2) + half, (low | high << 4).to(tl.uint8))
        group = tl.arange(0, C // 32)
        scale = tl.reshape((e + 127).to(tl.uint8), (C // 32,))
        tl.store(scales + row * (C // 32) + group, scale)
    else:
        tl.store(codes + row * C + c, tl.reshape(x, (B,)), mask=c < C)
