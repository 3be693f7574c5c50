# mypy: disable-error-code="no-untyped-def,assignment"
"""The indexer: scores of compressed entries on tensor cores, in bounded workspace (spec 3.7).

Native keys and queries are FP4 codes times powers of two. A tile multiplies them as fp16 values
relative to the largest scale of the row (of the key, or of one head's query); that scale, a power
of two, is multiplied back in float32. A code of 1/2 in a group whose scale is 2^23 below the row's
largest is still an fp16 number, so this is exact but for groups that weigh less than float32's last
bit. Products are at most 36 and sums at most 36 * C: far inside float32's integers.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..rows import PackedRows
from . import topk
from .remember import planes
from .row_format import fp4_codes, fp4_exponent, power_of_two, rotate, signs

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
    at_once = 16 if tokens <= FEW or padded % 64 else 64
    dtype = torch.float16 if native else torch.float32
    query = torch.empty(tokens, padded, width, dtype=dtype, device=q.device)
    share = torch.empty(tokens, padded, device=q.device)
    _prepare[(tokens, padded // at_once)](
        q,
        q.stride(0),
        weights,
        weights.stride(0),
        pos,
        freqs,
        query,
        share,
        HEADS=heads,
        PADDED=padded,
        HB=at_once,
        C=width,
        R=2 * len(freqs),
        NATIVE=native,
        num_warps=4 if at_once == 16 else 8,
    )
    return query, share


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
def _prepare(
    q,
    q_stride,
    weights,
    weights_stride,
    positions,
    freqs,
    query,
    share,
    HEADS: tl.constexpr,
    PADDED: tl.constexpr,
    HB: tl.constexpr,
    C: tl.constexpr,
    R: tl.constexpr,
    NATIVE: tl.constexpr,
):
    t = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * HB + tl.arange(0, HB)
    pos = tl.load(positions + t)
    c = tl.arange(0, C)
    at = q + t * q_stride + head[:, None] * C + c[None]
    x = tl.load(at, mask=(head < HEADS)[:, None], other=0.0)
    x = rotate(x, pos, freqs, HB, C, R, C)
    weight = tl.load(weights + t * weights_stride + head, mask=head < HEADS, other=0.0)
    into = query + (t * PADDED + head[:, None]) * C
    if NATIVE:
        parts = transformed(x, HB, C)
        powers = ()
        most = tl.full((HB,), -126, tl.int32)
        for g in tl.static_range(C // 32):
            largest = tl.maximum(
                tl.max(tl.abs(parts[2 * g]), 1), tl.max(tl.abs(parts[2 * g + 1]), 1)
            )
            e = fp4_exponent(largest)
            most = tl.maximum(most, e)
            powers = powers + (e,)  # noqa: RUF005
        eighth = tl.arange(0, 8)[None]
        for i in tl.static_range(C // 16):
            e = powers[i // 2]
            codes = fp4_codes(parts[i] * power_of_two(-e)[:, None])
            values = relative(codes, (e - most)[:, None])
            even, odd = tl.split(tl.reshape(values, (HB, 8, 2)))
            tl.store(into + (8 * i) + eighth, even)
            tl.store(into + (C // 2 + 8 * i) + eighth, odd)
        weight *= power_of_two(most)
    else:
        tl.store(into + c[None], x)
    tl.store(share + t * PADDED + head, weight)


@triton.jit
def transformed(x, N: tl.constexpr, C: tl.constexpr):
    """x (N, C) times the Hadamard matrix, in C / 16 pieces of 16 channels.

    The matrix is that of 16 channels, a small product, times that of C / 16: sums and differences.
    """
    i = tl.arange(0, 16)
    rows = tl.reshape(x, (N * (C // 16), 16))
    sums = tl.dot(rows, signs(i[:, None], i[None]), input_precision="tf32x3")
    x = tl.permute(tl.reshape(sums, (N, C // 16, 16)), (0, 2, 1))
    parts = (x,)
    for level in tl.static_range(1, 12):
        if C // 16 >> level:
            halves = ()
            for j in tl.static_range(1 << level - 1):
                both = tl.reshape(parts[j], (N, 16, 2, C // 16 >> level))
                a, b = tl.split(tl.permute(both, (0, 1, 3, 2)))
                halves = halves + (a, b)  # noqa: RUF005
            parts = halves
    for level in tl.static_range(12):
        if C // 16 >> level > 1:
            mixed = ()
            for j in tl.static_range(C // 16):
                if j >> level & 1:
                    mixed = mixed + (parts[j ^ 1 << level] - parts[j],)  # noqa: RUF005
                else:
                    mixed = mixed + (parts[j] + parts[j ^ 1 << level],)  # noqa: RUF005
            parts = mixed
    scale = 1.0 / tl.sqrt(tl.full((1, 1), C, tl.float32))
    scaled = ()
    for j in tl.static_range(C // 16):
        scaled = scaled + (tl.reshape(parts[j], (N, 16)) * scale,)  # noqa: RUF005
    return scaled


@triton.jit
def relative(codes, e):
    """FP4 codes times 2^e in fp16, -23 <= e <= 0; zero below that.

    The bits of a code, put where fp16 has its lowest exponent and highest mantissa bits, are the
    value times 2^-14, subnormal ones included.
    """
    bits = ((codes & 7) << 9) | ((codes & 8) << 12)
    power = tl.where(e < -23, 0, (e + 29) << 10)  # 2^(e + 14), of exponent bias 15
    values = bits.to(tl.int16).to(tl.float16, bitcast=True)
    return values * power.to(tl.int16).to(tl.float16, bitcast=True)


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
):
    """EB entries against TB tokens. A tile of keys serves the tokens of one slot after another."""
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
            low, high, power = native_keys(codes, scales, row, entry < entries, EB, C)
        else:
            c = tl.arange(0, C)
            at = codes + row[:, None] * C + c[None]
            low = tl.load(at, mask=(entry < entries)[:, None], other=0.0)
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
                products = tl.dot(low, every, input_precision="ieee")
            total = tl.sum(tl.maximum(products, 0.0) * weight[None], 1) * power
            into = scores + i * scores_stride + entry
            tl.store(into, total, mask=(entry < seen) & (entry < entries))
        now = other


@triton.jit
def native_keys(codes, scales, row, there, EB: tl.constexpr, C: tl.constexpr):
    """FP4 rows as fp16 relative to a power of two: channels of low and of high nibbles, power."""
    byte = tl.arange(0, C // 2)
    group = tl.arange(0, C // 32)
    at = codes + row[:, None] * (C // 2) + byte[None]
    pair = tl.load(at, mask=there[:, None], other=0).to(tl.int32)
    at_scale = scales + row[:, None] * (C // 32) + group[None]
    e = tl.load(at_scale, mask=there[:, None], other=0).to(tl.int32) - 127
    most = tl.maximum(tl.max(e, 1), -126)
    pair = tl.reshape(pair, (EB, C // 32, 16))
    e = (e - most[:, None])[:, :, None]
    low = tl.reshape(relative(pair & 15, e), (EB, C // 2))
    high = tl.reshape(relative(pair >> 4, e), (EB, C // 2))
    return low, high, power_of_two(most)
