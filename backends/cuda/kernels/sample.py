"""Penalties and greedy choice over the vocabulary, without a wait for the host."""

import torch
import triton
import triton.language as tl
from torch import Tensor

CHUNK = 4096  # logits of a program


@triton.jit
def _better(value, id, other_value, other_id):
    """The larger value; of equal ones the lower id."""
    wins = (value > other_value) | ((value == other_value) & (id < other_id))
    return tl.where(wins, value, other_value), tl.where(wins, id, other_id)


@triton.jit
def _best_of_chunk(logits, value, id, V, row, BLOCK: tl.constexpr):
    r, c = tl.program_id(0), tl.program_id(1)
    i = c * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(logits + r.to(tl.int64) * row + i, i < V, float("-inf"))
    best, which = tl.reduce((x, i), 0, _better)
    at = r * tl.num_programs(1) + c
    tl.store(value + at, best)
    tl.store(id + at, which)


@triton.jit
def _best_of_row(value, id, out, N, BLOCK: tl.constexpr):
    r, i = tl.program_id(0), tl.arange(0, BLOCK)
    x = tl.load(value + r * N + i, i < N, float("-inf"))
    which = tl.load(id + r * N + i, i < N, 0x7FFFFFFF)
    _, which = tl.reduce((x, which), 0, _better)
    tl.store(out + r, which)


def best_of_chunks(logits: Tensor, chunk: int) -> tuple[Tensor, Tensor]:
    """(R, V) float32, any row stride -> the largest of each chunk of a row, and its id, int32."""
    rows, vocabulary = logits.shape
    value = logits.new_empty(rows, triton.cdiv(vocabulary, chunk))
    id = torch.empty_like(value, dtype=torch.int32)
    _best_of_chunk[tuple(value.shape)](
        logits, value, id, vocabulary, logits.stride(0), BLOCK=chunk, num_warps=chunk // 512
    )
    return value, id


def greedy(logits: Tensor, out: Tensor | None = None) -> Tensor:
    """(R, V) float32, any row stride -> (R,) int32: the largest, of equal ones the lower id."""
    value, id = best_of_chunks(logits, CHUNK)
    rows, chunks = value.shape
    out = id.new_empty(rows) if out is None else out
    _best_of_row[(rows,)](value, id, out, chunks, BLOCK=triton.next_power_of_2(chunks), num_warps=1)
    return out


@triton.jit
def _adjust(logits, ids, factor, offset, out, row, P, BLOCK: tl.constexpr):
    r, i = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    id = tl.load(ids + r * P + i, i < P, -1).to(tl.int64)
    ok = id >= 0
    old, f = tl.load(logits + r * row + id, ok, 0.0), tl.load(factor + r * P + i, ok, 1.0)
    new = tl.where(old > 0, tl.div_rn(old, f), old * f) + tl.load(offset + r * P + i, ok, 0.0)
    tl.store(out + r * row + id, new, ok)


def adjust(logits: Tensor, ids: Tensor, factor: Tensor, offset: Tensor) -> Tensor:
    """Penalties and biases (backend.py): logits (R, V), the others (R, P), contiguous."""
    out = logits.clone(memory_format=torch.contiguous_format)
    count = ids.shape[1]
    if count:
        grid = len(ids), triton.cdiv(count, 256)
        _adjust[grid](out, ids, factor, offset, out, out.stride(0), count, BLOCK=256, num_warps=4)
    return out
