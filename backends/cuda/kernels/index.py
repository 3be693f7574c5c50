# mypy: disable-error-code="no-untyped-def"

"""The indexer: queries, scores of compressed entries, the best of them (spec 3.7).

Workspace is bounded: a long step is scored a tile of tokens at a time.
"""

import ctypes
import functools
from pathlib import Path

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..nvrtc import Kernel, Module
from ..rows import PackedRows, planes
from . import topk
from .index_score import score_few, score_many
from .remember import overlaps
from .row_format import rotation, turned

SCORES_BYTES = 256 << 20  # workspace of one tile of queries
FEW = 32  # most tokens for which each has programs of its own
FEW_TILE = 128, 4, 2, 3  # entries at once, warps, stages, programs a multiprocessor
MANY_TILE = 64, 128, 8, 3  # tokens and entries of a program, warps, stages


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
    strides = q.stride(0), weights.stride(0)
    if not native:
        arrays = q, weights, pos, freqs, query, share
        _rotate[(tokens, padded // 16)](*arrays, *strides, heads, padded, C=width, R=2 * len(freqs))
        return query, share
    if q.data_ptr() % 16 or q.stride(0) % 4:
        q = q.contiguous()  # read 16 bytes at a time
    warps, each = (4, 1) if tokens <= FEW else (2, 8)
    sizes = q.stride(0), weights.stride(0), heads, padded, 2 * len(freqs), each
    pointers = [ctypes.c_uint64(x.data_ptr()) for x in (q, weights, pos, freqs, query, share)]
    _kernel(width)(
        (padded // (warps * each), tokens, 1),
        32 * warps,
        *pointers,
        *map(ctypes.c_int, sizes),
    )
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
    codes, scales, _ = planes(pool)
    common = query, share, codes, scales, pool.size, slot, pos
    rest = entries, k, scores, scores.stride(0)
    early = overlaps(query)
    switches = {"HEADS": heads, "C": width, "RATIO": ratio, "PDL": early, "launch_pdl": early}
    switches["ASM"] = not triton.knobs.runtime.interpret
    if native and tokens <= FEW:
        block, warps, stages, each = FEW_TILE
        programs = min(triton.cdiv(entries, block), max(1, each * _processors(query) // tokens))
        switches |= {"EB": block, "STAGES": stages, "num_warps": warps}
        score_few[(programs, tokens)](*common, *rest, **switches)
        return
    each, block, warps, stages = MANY_TILE
    block = block if native else 32
    switches |= {"TB": each, "EB": block, "NATIVE": native}
    switches |= {"num_warps": warps, "num_stages": stages}
    grid = triton.cdiv(entries, block), triton.cdiv(tokens, each)
    score_many[grid](*common, tokens, *rest, **switches)


def _processors(x: Tensor) -> int:
    if not x.is_cuda:
        return 1
    return int(torch.cuda.get_device_properties(x.device).multi_processor_count)


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
    cos, sin = rotation(tl.load(positions + t), freqs, C, R, C)
    weight = tl.load(weights + t * weights_stride + head, mask=there, other=0.0)
    tl.store(query + (t * padded + head[:, None]) * C + c, turned(x, cos, sin))
    tl.store(share + t * padded + head, weight)
