# mypy: disable-error-code="no-untyped-def,assignment"
"""Scores of compressed entries on tensor cores.

Native keys and queries are FP4 codes times powers of two. A tile multiplies them as fp16 values
relative to the largest scale of the row (of the key, or of one head's query); that scale, a power
of two, is multiplied back in float32. A code of 1/2 in a group whose scale is 2^23 below the row's
largest is still an fp16 number: what is lost is less than the last bit of a float32 sum. Products
are at most 36 and sums at most 36 * C, far below float32's limits.
"""

import triton
import triton.language as tl

from .row_format import power_of_two

# Four bytes in $4 and the powers of their groups in $5 and $6, both as fp16 pairs: the low nibbles'
# values go to $0 and $1, the high ones' to $2 and $3. See fp4_bits for the bits.
DECODE = tl.constexpr("""
{
.reg .b32 a, b, t, u;
prmt.b32 a, $4, 0, 0x4140;
prmt.b32 b, $4, 0, 0x4342;
shl.b32 t, a, 9;
shl.b32 u, a, 12;
and.b32 t, t, 0x0e000e00;
lop3.b32 t, u, 0x80008000, t, 0xea;
mul.f16x2 $0, t, $5;
shl.b32 t, b, 9;
shl.b32 u, b, 12;
and.b32 t, t, 0x0e000e00;
lop3.b32 t, u, 0x80008000, t, 0xea;
mul.f16x2 $1, t, $6;
shl.b32 t, a, 5;
shl.b32 u, a, 8;
and.b32 t, t, 0x0e000e00;
lop3.b32 t, u, 0x80008000, t, 0xea;
mul.f16x2 $2, t, $5;
shl.b32 t, b, 5;
shl.b32 u, b, 8;
and.b32 t, t, 0x0e000e00;
lop3.b32 t, u, 0x80008000, t, 0xea;
mul.f16x2 $3, t, $6;
}
""")


@triton.jit
def score_many(
    query,
    share,
    codes,
    scales,
    pool_size,
    slots,
    positions,
    tokens,
    entries,
    k,
    scores,
    scores_stride,
    HEADS: tl.constexpr,
    C: tl.constexpr,
    RATIO: tl.constexpr,
    TB: tl.constexpr,
    EB: tl.constexpr,
    NATIVE: tl.constexpr,
    ASM: tl.constexpr,
    PDL: tl.constexpr,
):
    """EB entries against TB tokens. A tile of keys serves the tokens of one slot after another."""
    if PDL:
        tl.extra.cuda.gdc_wait()
    first = tl.program_id(0) * EB
    entry = first + tl.arange(0, EB)
    t = tl.program_id(1) * TB + tl.arange(0, TB)
    slot = tl.load(slots + t, mask=t < tokens, other=-1)
    visible = tl.load(positions + t, mask=t < tokens, other=-1) + 1
    visible = tl.where(visible > 0, visible // RATIO, 0)
    wanted = (visible > first) & (visible > k)
    now = tl.min(tl.where(wanted, t, tokens))
    head = tl.arange(0, HEADS)
    while now < tokens:
        here = tl.load(slots + now)
        mine = wanted & (t >= now) & (slot == here)
        other = tl.min(tl.where(wanted & (t >= now) & (slot != here), t, tokens))
        last = tl.max(tl.where(mine & (t < other), t, 0)) + 1
        row = here.to(tl.int64) * (pool_size + 1) + entry
        if NATIVE:
            low, high, power = native_keys(codes, scales, row, entry < entries, EB, C, ASM)
        else:
            key = codes + row[:, None] * C + tl.arange(0, C)[None]
            low = tl.load(key, mask=(entry < entries)[:, None], other=0.0)
            high = low
            power = tl.full((EB,), 1.0, tl.float32)
        for i in tl.range(now, last):
            weight = tl.load(share + i * HEADS + head)
            seen = (tl.load(positions + i) + 1) // RATIO
            at = query + i * (HEADS * C) + head[None] * C
            if NATIVE:
                half = tl.arange(0, C // 2)[:, None]
                products = tl.dot(low, tl.load(at + half))
                products = tl.dot(high, tl.load(at + C // 2 + half), products)
            else:
                every = tl.load(at + tl.arange(0, C)[:, None])
                products = tl.dot(low, every, input_precision="tf32x3")
            total = tl.sum(tl.maximum(products, 0.0) * weight[None], 1) * power
            into = scores + i * scores_stride + entry
            tl.store(into, total, mask=(entry < seen) & (entry < entries))
        now = other


@triton.jit
def score_few(
    query,
    share,
    codes,
    scales,
    pool_size,
    slots,
    positions,
    entries,
    k,
    scores,
    scores_stride,
    HEADS: tl.constexpr,
    C: tl.constexpr,
    RATIO: tl.constexpr,
    EB: tl.constexpr,
    STAGES: tl.constexpr,
    ASM: tl.constexpr,
    PDL: tl.constexpr,
):
    """One token against every so many EB entries of native keys."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    t = tl.program_id(1)
    visible = tl.minimum((tl.load(positions + t) + 1) // RATIO, entries)
    if visible > k:
        head = tl.arange(0, HEADS)
        half = tl.arange(0, C // 2)[:, None]
        at = query + (t * HEADS + head[None]) * C + half
        even = tl.load(at)
        odd = tl.load(at + C // 2)
        weight = tl.load(share + t * HEADS + head)[None]
        first = tl.load(slots + t).to(tl.int64) * (pool_size + 1)
        blocks = tl.cdiv(visible, EB)
        for b in tl.range(tl.program_id(0), blocks, tl.num_programs(0), num_stages=STAGES):
            entry = b * EB + tl.arange(0, EB)
            there = entry < visible
            low, high, power = native_keys(codes, scales, first + entry, there, EB, C, ASM)
            products = tl.dot(high, odd, tl.dot(low, even))
            total = tl.sum(tl.maximum(products, 0.0) * weight, 1) * power
            tl.store(scores + t * scores_stride + entry, total, mask=there)


@triton.jit
def native_keys(codes, scales, row, there, EB: tl.constexpr, C: tl.constexpr, ASM: tl.constexpr):
    """FP4 rows as fp16 relative to a power of two: channels of low and of high nibbles, power."""
    byte = tl.arange(0, C // 2)
    group = tl.arange(0, C // 32)
    at = codes + row[:, None] * (C // 2) + byte[None]
    pair = tl.load(at, mask=there[:, None], other=0)
    at_scale = scales + row[:, None] * (C // 32) + group[None]
    e = tl.load(at_scale, mask=there[:, None], other=0).to(tl.int32) - 127
    most = tl.maximum(tl.max(e, 1), -126)
    e -= most[:, None]
    power = tl.where(e < -23, 0, (e + 29) << 10)  # 2^(e + 14) in fp16, of exponent bias 15
    power = power.to(tl.int16).to(tl.float16, bitcast=True)
    power = tl.reshape(tl.broadcast_to(power[:, :, None], (EB, C // 32, 16)), (EB, C // 2))
    if ASM:
        low, high = tl.inline_asm_elementwise(
            DECODE,
            "=r,=r,=r,=r,r,r,r",
            [pair, power],
            dtype=(tl.float16, tl.float16),
            is_pure=True,
            pack=4,
        )
    else:
        low = fp4_bits(pair & 15) * power
        high = fp4_bits(pair >> 4) * power
    return low, high, power_of_two(most)


@triton.jit
def fp4_bits(code):
    """FP4 codes times 2^-14 in fp16: a code's bits, put where fp16 has its lowest exponent bits and
    highest mantissa bit, are that, subnormal ones included.
    """
    code = code.to(tl.int32)
    return (((code & 7) << 9) | ((code & 8) << 12)).to(tl.int16).to(tl.float16, bitcast=True)
