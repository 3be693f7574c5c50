"""Streams for drafters: stored, averaged, or normed beside a token's row, in a launch each."""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from ..activation import Activation
from ..pending import Mixed
from ..rows import PackedRows
from .early import starts_early

STREAMS = tl.constexpr(4)


@triton.jit
def _output(y, y2, t, y_row, y2_row, d, ok, D, SECOND: tl.constexpr, PARTS: tl.constexpr):
    """A sublayer's output for token t, its parts added in order."""
    v = tl.load(y + t * y_row + d, ok, 0.0)
    for part in tl.static_range(1, PARTS):
        v += tl.load(y + t * y_row + part * D + d, ok, 0.0)
    if SECOND:
        v += tl.load(y2 + t * y2_row + d, ok, 0.0)
    return v


@triton.jit
def _ring_row(slot, pos, size, r):
    """Which row of a ring belongs to token r: the scratch row if it is padding."""
    p = tl.load(pos + r)
    return tl.load(slot + r).to(tl.int64) * (size + 1) + tl.where(p < 0, size, p % size)


@triton.jit
def _store_streams(
    h, y, y2, post, comb, rows, ring, size, slot, pos, y_row, y2_row, D,
    GATHER: tl.constexpr, SECOND: tl.constexpr, PARTS: tl.constexpr, BLOCK: tl.constexpr,
    EARLY: tl.constexpr,
):  # fmt: skip
    if EARLY:
        gdc_launch_dependents()
        gdc_wait()
    r, k, d = tl.program_id(0), tl.program_id(1), tl.arange(0, BLOCK)
    t, ok = (tl.load(rows + r) if GATHER else r).to(tl.int64), d < D
    v = _output(y, y2, t, y_row, y2_row, d, ok, D, SECOND, PARTS)
    new = tl.load(post + t * STREAMS + k) * v
    for j in tl.static_range(0, STREAMS):
        share = tl.load(comb + (t * STREAMS + j) * STREAMS + k)
        new += share * tl.load(h + (t * STREAMS + j) * D + d, ok, 0.0)
    tl.store(ring + (_ring_row(slot, pos, size, r) * STREAMS + k) * D + d, new, ok)


@triton.jit
def _mean_of_streams(
    h, y, y2, post, comb, rows, out, y_row, y2_row, D,
    GATHER: tl.constexpr, SECOND: tl.constexpr, PARTS: tl.constexpr, BLOCK: tl.constexpr,
    EARLY: tl.constexpr,
):  # fmt: skip
    if EARLY:
        gdc_launch_dependents()
        gdc_wait()
    r, d, k = tl.program_id(0), tl.arange(0, BLOCK), tl.arange(0, STREAMS)
    t, ok = (tl.load(rows + r) if GATHER else r).to(tl.int64), d < D
    new = tl.sum(tl.load(post + t * STREAMS + k), 0) * _output(
        y, y2, t, y_row, y2_row, d, ok, D, SECOND, PARTS
    )
    for j in tl.static_range(0, STREAMS):
        share = tl.sum(tl.load(comb + (t * STREAMS + j) * STREAMS + k), 0)
        new += share * tl.load(h + (t * STREAMS + j) * D + d, ok, 0.0)
    tl.store(out + r.to(tl.int64) * D + d, new / STREAMS, ok)


@triton.jit
def _store_half(y, v, row, panel, token, k, ok):
    v = tl.minimum(tl.maximum(v, -65504.0), 65504.0).to(tl.float16)
    tl.store(y + ((k // 8).to(tl.int64) * panel + row * token) * 8 + k % 8, v, ok)


@triton.jit
def _join_inputs(
    ring, size, slot, pos, table, ids, hnorm, enorm, x, x_panel, x_token, e, e_panel, e_token, eps,
    D, BLOCK: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """Program (t, s): stream s of what is stored for token t, or with s = 4 the token's row."""
    if EARLY:
        gdc_launch_dependents()
        gdc_wait()
    t, s, k = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.arange(0, BLOCK)
    ok = k < D
    if s < STREAMS:
        row = _ring_row(slot, pos, size, t) * STREAMS + s
        v = tl.load(ring + row * D + k, ok, 0.0)
        v *= tl.rsqrt(tl.sum(v * v, 0) / D + eps) * tl.load(hnorm + k, ok, 0.0)
        _store_half(x, v, t * STREAMS + s, x_panel, x_token, k, ok)
    else:
        v = tl.load(table + tl.load(ids + t).to(tl.int64) * D + k, ok, 0.0).to(tl.float32)
        v *= tl.rsqrt(tl.sum(v * v, 0) / D + eps) * tl.load(enorm + k, ok, 0.0)
        _store_half(e, v, t, e_panel, e_token, k, ok)


@triton.jit
def _to_half(x, y, panel, token, first, D, BLOCK: tl.constexpr, EARLY: tl.constexpr):
    if EARLY:
        gdc_launch_dependents()
        gdc_wait()
    t, k = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    v = tl.load(x + t * D + k, k < D, 0.0)
    _store_half(y, v, t, panel, token, first + k, k < D)


@triton.jit
def _markov_inputs(
    table, tokens, hidden, w, y, panel, token, out, D,
    RANK: tl.constexpr, BR: tl.constexpr, BLOCK: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    if EARLY:
        gdc_launch_dependents()
        gdc_wait()
    r, k, d = tl.program_id(0).to(tl.int64), tl.arange(0, BR), tl.arange(0, BLOCK)
    row = tl.load(table + tl.load(tokens + r).to(tl.int64) * RANK + k, k < RANK, 0.0)
    row = row.to(tl.float32)
    _store_half(y, row, r, panel, token, k, k < RANK)
    sure = tl.sum(row * tl.load(w + D + k, k < RANK, 0.0).to(tl.float32), 0)
    h = tl.load(hidden + r * D + d, d < D, 0.0)
    sure += tl.sum(h * tl.load(w + d, d < D, 0.0).to(tl.float32), 0)
    tl.store(out + r, sure)


@triton.jit
def _rows_seen(pos, ids, size, SIZE: tl.constexpr, WINDOW: tl.constexpr, BLOCK: tl.constexpr):
    t, k = tl.program_id(0), tl.arange(0, BLOCK)
    at = tl.load(pos + t // SIZE * SIZE) - WINDOW + k
    tl.store(ids + t * (WINDOW + SIZE) + k, tl.where(at < 0, -1, at % size), k < WINDOW + SIZE)


def store_streams(h: Mixed, ring: PackedRows, slot: Tensor, pos: Tensor) -> None:
    """The streams after a sublayer into float rows (4 D wide) at (slot, pos % size), int32 (T,)."""
    assert ring.data is not None
    count, width, early = len(slot), h.streams.shape[2], starts_early(ring.data, len(slot))
    pointers, strides, flags = _of(h)
    _store_streams[count, STREAMS.value](
        *pointers, ring.data, ring.size, slot, pos, *strides, width,
        **flags, BLOCK=triton.next_power_of_2(width), EARLY=early, num_warps=8, launch_pdl=early,
    )  # fmt: skip


def mean_of_streams(h: Mixed) -> Tensor:
    """float32 (T, D), or only h.rows of it."""
    count, width = len(h.streams) if h.rows is None else len(h.rows), h.streams.shape[2]
    out, early = h.streams.new_empty(count, width), starts_early(h.streams, count)
    pointers, strides, flags = _of(h)
    _mean_of_streams[count,](
        *pointers, out, *strides, width,
        **flags, BLOCK=triton.next_power_of_2(width), EARLY=early, num_warps=8, launch_pdl=early,
    )  # fmt: skip
    return out


def join_inputs(
    ring: PackedRows,
    slot: Tensor,
    pos: Tensor,
    table: Tensor,
    ids: Tensor,
    hnorm: Tensor,
    enorm: Tensor,
    eps: float,
) -> tuple[Activation, Activation]:
    """Streams stored at (slot, pos % size) -> normed (4 T, D), and rows `ids` of a table (T, D)."""
    assert ring.data is not None
    count, width = len(slot), table.shape[1]
    x = Activation.empty(STREAMS.value * count, width, ring.data.device)
    e = Activation.empty(count, width, ring.data.device)
    block, early = triton.next_power_of_2(width), starts_early(ring.data, count)
    _join_inputs[count, STREAMS.value + 1](
        ring.data, ring.size, slot, pos, table, ids, hnorm, enorm,
        x.data, *(n // 8 for n in x.strides), e.data, *(n // 8 for n in e.strides), eps, width,
        BLOCK=block, EARLY=early, num_warps=max(1, min(8, block // 256)), launch_pdl=early,
    )  # fmt: skip
    return x, e


def side_by_side(parts: Sequence[Tensor]) -> Activation:
    """float32 (T, D) each, contiguous -> (T, D times their number), saturating."""
    count, width = parts[0].shape
    out = Activation.empty(count, len(parts) * width, parts[0].device)
    block, early = triton.next_power_of_2(width), starts_early(parts[0], count)
    for number, part in enumerate(parts):
        _to_half[count,](
            part, out.data, *(n // 8 for n in out.strides), number * width, width,
            BLOCK=block, EARLY=early, num_warps=max(1, min(8, block // 256)), launch_pdl=early,
        )  # fmt: skip
    return out


def markov_inputs(
    table: Tensor, tokens: Tensor, hidden: Tensor, w: Tensor
) -> tuple[Activation, Tensor]:
    """Rows `tokens` of a table (V, K) of any float type, and how sure a guess is: float32 (R,).

    That is the product of w (1, D + K) with `hidden` (R, D), float32, and the row, side by side.
    """
    (count, width), rank = hidden.shape, table.shape[1]
    out, early = Activation.empty(count, rank, hidden.device), starts_early(hidden, count)
    sure = hidden.new_empty(count)
    _markov_inputs[count,](
        table, tokens, hidden, w, out.data, *(n // 8 for n in out.strides), sure, width,
        RANK=rank, BR=triton.next_power_of_2(rank), BLOCK=triton.next_power_of_2(width),
        EARLY=early, num_warps=8, launch_pdl=early,
    )  # fmt: skip
    return out, sure


def rows_seen(pos: Tensor, size: int, window: int, ring: int) -> Tensor:
    """What tokens of blocks see in a ring of so many rows: int32 (T, window + size), -1 for none.

    The rows of the whole block, and of `window` positions before it.
    """
    ids = torch.empty(len(pos), window + size, dtype=torch.int32, device=pos.device)
    block = triton.next_power_of_2(window + size)
    _rows_seen[len(pos),](pos, ids, ring, SIZE=size, WINDOW=window, BLOCK=block)
    return ids


def same_streams(tokens: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """A mix by which the output goes into every stream, and each stream stays what it is."""
    ones = torch.ones(tokens, STREAMS.value, device=device)
    return ones, torch.eye(STREAMS.value, device=device).flatten().repeat(tokens, 1)


def _of(h: Mixed) -> tuple[tuple[Tensor, ...], tuple[int, int], dict[str, int]]:
    second = h.y if h.y2 is None else h.y2
    rows = h.streams if h.rows is None else h.rows
    parts = h.y.shape[1] if h.y.ndim == 3 else 1
    flags = {"GATHER": h.rows is not None, "SECOND": h.y2 is not None, "PARTS": parts}
    return (
        (h.streams, h.y, second, *h.mix, rows),
        (h.y.stride(0), second.stride(0)),
        flags,
    )
