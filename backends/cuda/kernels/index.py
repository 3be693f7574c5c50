# mypy: disable-error-code="no-untyped-def,assignment"
"""The indexer: scores of compressed entries on tensor cores, in bounded workspace (spec 3.7).

Native keys and queries are FP4 codes times powers of two. A tile multiplies them as fp16 values
relative to the largest scale of the row (of the key, or of one head's query); that scale, a power
of two, is multiplied back in float32. A code of 1/2 in a group whose scale is 2^23 below the row's
largest is still an fp16 number, so this is exact but for groups that weigh less than float32's last
bit. Products are at most 36 and sums at most 36 * C: far inside float32's integers.
"""

import ctypes
import functools
from pathlib import Path

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..nvrtc import Kernel, Module
from ..rows import PackedRows
from . import topk
from .remember import overlaps, planes
from .row_format import power_of_two, rotate

SCORES_BYTES = 256 << 20  # workspace of one tile of queries
FEW = 32  # most tokens for which each has programs of its own
FEW_TILE = 1, 128, 4, 1  # tokens and entries of a program, warps, stages
MANY_TILE = 64, 128, 4, 3


def index(
    q: Tensor,
    weights: Tensor,
    pool: PackedRows,
    slot: Tensor,
    pos: Tensor,
    span: int,
    freqs: Tensor,
    ratio: int,
    k: int,
) -> Tensor:
    """The operation `index` of ds4/backend.py, but that ids come in ascending order.

    q float32 (T, N, C) and weights float32 (T, N), rows of any stride; slot and pos int32 (T,);
    freqs float32 (R / 2,). Returns int32 (T, min(k, span // ratio)) entries, then -1.
    """
    tokens = len(q)
    entries = min(span // ratio, pool.size)
    k = min(k, entries)
    ids = torch.empty(tokens, k, dtype=torch.int32, device=q.device)
    if entries <= k:  # every visible entry is chosen
        _fill[(tokens,)](pos, ids, k, ratio, BLOCK=triton.next_power_of_2(max(k, 1)))
        return ids
    stride = -(-entries // 128) * 128
    tile = tokens if tokens <= FEW else max(FEW, min(tokens, SCORES_BYTES // (4 * stride)))
    scores = torch.empty(tile, stride, device=q.device)
    for start in range(0, tokens, tile):
        some = slice(start, start + tile)
        query, share = prepare(q[some], weights[some], pos[some], freqs, pool.data is None)
        score(query, share, pool, slot[some], pos[some], entries, ratio, k, scores)
        topk.choose(scores, pos[some], ratio, entries, ids[some])
    return ids


def prepare(
    q: Tensor, weights: Tensor, pos: Tensor, freqs: Tensor, native: bool
) -> tuple[Tensor, Tensor]:
    """Queries as `score` takes them: (T, heads up to a multiple of 16, C), and weights (T, same).

    Rotated; native also rounded to FP4: fp16 relative to a power of two that goes into the
    weights, even channels first, then odd ones, as the nibbles of a key's bytes.
    """
    tokens, heads, width = q.shape
    padded = -(-heads // 16) * 16
    dtype = torch.float16 if native else torch.float32
    query = torch.empty(tokens, padded, width, dtype=dtype, device=q.device)
    share = torch.empty(tokens, padded, device=q.device)
    sizes = q.stride(0), weights.stride(0), heads, padded, 2 * len(freqs)
    if not native:
        grid = (tokens, padded // 16)
        _rotate[grid](q, weights, pos, freqs, query, share, *sizes[:4], C=width, R=sizes[4])
        return query, share
    warps, each = (4, 1) if tokens <= FEW else (2, 8)
    pointers = [ctypes.c_uint64(x.data_ptr()) for x in (q, weights, pos, freqs, query, share)]
    grid = padded // (warps * each), tokens, 1
    _kernel(width)(grid, 32 * warps, *pointers, *map(ctypes.c_int, (*sizes, each)))
    return query, share


def source() -> str:
    return Path(__file__).with_suffix(".cu").read_text("utf-8")


def options(width: int) -> list[str]:
    """The compiler's."""
    return [f"-DC={width}"]


@functools.cache
def _kernel(width: int) -> Kernel:
    return Module(source(), options(width)).kernel("prepare")


def score(
    query: Tensor,
    share: Tensor,
    pool: PackedRows,
    slot: Tensor,
    pos: Tensor,
    entries: int,
    ratio: int,
    k: int,
    scores: Tensor,
) -> None:
    """Write the scores of visible entries; rows in which at most k are visible stay as they are."""
    tokens, heads, width = query.shape
    native = pool.data is None
    each, block, warps, stages = FEW_TILE if tokens <= FEW else MANY_TILE
    if not native:
        block = 32
    codes, scales, _ = planes(pool)
    _score[(triton.cdiv(entries, block), triton.cdiv(tokens, each))](
        query,
        share,
        codes,
        scales,
        pool.size,
        slot,
        pos,
        tokens,
        entries,
        k,
        scores,
        scores.stride(0),
        HEADS=heads,
        C=width,
        RATIO=ratio,
        TB=each,
        EB=block,
        NATIVE=native,
        ASM=not triton.knobs.runtime.interpret,
        PDL=overlaps(query),
        launch_pdl=overlaps(query),
        num_warps=warps,
        num_stages=stages,
    )


@triton.jit
def _fill(positions, ids, k, ratio, BLOCK: tl.constexpr):
    t = tl.program_id(0)
    entry = tl.arange(0, BLOCK)
    visible = entry < (tl.load(positions + t) + 1) // ratio
    tl.store(ids + t * k + entry, tl.where(visible, entry, -1), mask=entry < k)


@triton.jit
def _rotate(
    q,
    weights,
    positions,
    freqs,
    query,
    share,
    q_stride,
    weights_stride,
    heads,
    padded,
    C: tl.constexpr,
    R: tl.constexpr,
):
    """`prepare` in exact mode, 16 heads of one token."""
    t = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * 16 + tl.arange(0, 16)
    c = tl.arange(0, C)[None]
    there = head < heads
    x = tl.load(q + t * q_stride + head[:, None] * C + c, mask=there[:, None], other=0.0)
    x = rotate(x, tl.load(positions + t), freqs, 16, C, R, C)
    weight = tl.load(weights + t * weights_stride + head, mask=there, other=0.0)
    tl.store(query + (t * padded + head[:, None]) * C + c, x)
    tl.store(share + t * padded + head, weight)


@triton.jit
def _score(
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
            """
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
            """,
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
