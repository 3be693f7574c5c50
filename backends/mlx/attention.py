"""Attention over a window, compressed entries and a sink, in blocks of queries of bounded memory.

What a block sees is read as slices of exactly the rows that are visible to it, so that one token
needs no mask, and a mask is never larger than a block. Only entries that an indexer chose for
several tokens are gathered, for a few tokens at a time.
"""

from typing import Any

import mlx.core as mx
import numpy as np

from .facts import Facts, Run, rotate
from .rows import Rows
from .weights import across

NEVER = -float("inf")
LOGITS = 1 << 24  # float32 values that one block of queries may hold
GATHERED = 1 << 23  # float32 values of entries gathered at a time
BLOCK = 128


def attend(
    q: mx.array,
    sink: mx.array,
    run: Run,
    ring: Rows,
    window: int,
    pool: Rows | None,
    ratio: int,
    ids: mx.array | None,
) -> mx.array:
    """(n, N, C), turned and scaled, of one run -> (n, N, C); `ids` (n, k): entries, from index."""
    if _all_chosen(run, ratio, ids):
        ids = None
    size = _block(q, run, window, ratio, ids)
    blocks = []
    for first in range(0, run.length, size):
        part = run.part(first, size)
        rows = slice(first, first + part.length)
        chosen = None if ids is None or _all_chosen(part, ratio, ids) else ids[rows]
        blocks.append(_block_of(q[rows], sink, part, ring, window, pool, ratio, chosen))
        if run.length > size:
            mx.eval(blocks[-1])  # MLX would allocate all blocks before it computed one
    return blocks[0] if len(blocks) == 1 else mx.concatenate(blocks)


def _all_chosen(run: Run, ratio: int, ids: mx.array | None) -> bool:
    """Whether the indexer chose every entry that the run's tokens see."""
    return ids is not None and run.stop // ratio <= ids.shape[1]


def attend_rows(
    q: mx.array,
    sink: mx.array,
    turn: mx.array,
    ring: mx.array,
    near: mx.array,
    pool: mx.array,
    far: mx.array,
    eps: float,
) -> mx.array:
    """The same from row numbers, -1 for none: what the Metal kernel computes, in stock operations.

    (T, N, C), as projected, `near` (T, W) in `ring` (rows, C) and `far` (T, K) in `pool`, turns
    (T, rotary / 2) -> (T, N, C), turned back.
    """
    q = rotate(mx.fast.rms_norm(q, None, eps), turn) * q.shape[-1] ** -0.5
    keys = mx.concatenate([ring[mx.maximum(near, 0)], pool[mx.maximum(far, 0)]], 1)
    keys = keys.astype(mx.float32)
    seen = mx.concatenate([near, far], 1) >= 0
    logits = mx.where(seen[:, None], q @ keys.swapaxes(1, 2), NEVER)
    sinks = mx.broadcast_to(sink[:, None], (*logits.shape[:2], 1))
    share = mx.softmax(mx.concatenate([logits, sinks], -1), -1)[..., :-1]
    return rotate(share @ keys, mx.conjugate(turn))


def row_numbers(
    facts: Facts, c: Any, window: int, ratio: int, ids: mx.array | None
) -> tuple[mx.array, mx.array]:
    """int32 (T, W) and (T, K): rows of the flattened ring and pool that tokens see, -1 for none."""
    pos, slot = facts.pos[:, None], facts.slot[:, None]

    def near() -> mx.array:
        at = pos - np.arange(window)
        rows = slot * (c.window.size + 1) + at % c.window.size
        return mx.array(np.where(at < 0, -1, rows).astype(np.int32))

    def far() -> mx.array:
        entries = np.arange(max(1, (int(facts.pos.max()) + 1) // ratio if ratio else 0))
        seen = entries < (pos + 1) // ratio if ratio else np.zeros((len(pos), 1), bool)
        rows = slot * (c.pool.size + 1) + entries if ratio else entries
        return mx.array(np.where(seen, rows, -1).astype(np.int32))

    rows = facts.keep(("near", c.window.size), near)
    if ids is None or (int(facts.pos.max()) + 1) // ratio <= ids.shape[1]:  # all were chosen
        return rows, facts.keep(("far", ratio, c.pool and c.pool.size), far)
    if not facts.slot.any():
        return rows, ids
    return rows, mx.where(ids < 0, -1, ids + mx.array(slot * (c.pool.size + 1)))


def _block(q: mx.array, run: Run, window: int, ratio: int, ids: mx.array | None) -> int:
    """How many queries go together."""
    _, heads, width = q.shape
    if ids is not None:
        return max(1, min(BLOCK, GATHERED // (ids.shape[1] * width)))
    entries = run.stop // ratio if ratio else 0
    return max(1, min(BLOCK, LOGITS // (heads * (window + BLOCK + entries))))


def _block_of(
    q: mx.array,
    sink: mx.array,
    run: Run,
    ring: Rows,
    window: int,
    pool: Rows | None,
    ratio: int,
    ids: mx.array | None,
) -> mx.array:
    n, heads, width = q.shape
    first = max(0, run.start - window + 1)
    keys = ring.recent(run.slot, first, run.stop)
    seen = None if n == 1 else _window_mask(run, first, window)
    gathered = None
    if pool is not None and ids is not None and n == 1:
        keys = mx.concatenate([keys, pool.chosen(run.slot, ids[0])])  # more are visible than chosen
    elif pool is not None and ids is not None:
        gathered = pool.chosen(run.slot, mx.maximum(ids, 0)).astype(mx.float32)
    elif pool is not None and run.stop >= ratio:
        entries = run.stop // ratio
        keys = mx.concatenate([keys, pool.entries(run.slot, 0, entries)])
        if seen is not None:
            seen = np.concatenate([seen, _entry_mask(run, ratio, entries)], 1)
    keys = keys.astype(mx.float32)
    logits = (q.reshape(n * heads, width) @ across(keys)).reshape(n, heads, -1)
    if seen is not None:
        logits = mx.where(mx.array(seen)[:, None], logits, NEVER)
    parts = [logits, mx.broadcast_to(sink[:, None], (n, heads, 1))]
    if gathered is not None and ids is not None:
        chosen = mx.where((ids >= 0)[:, None], q @ across(gathered), NEVER)
        parts.insert(1, chosen)
    share = mx.softmax(mx.concatenate(parts, -1), -1)
    o = share[..., : len(keys)].reshape(n * heads, -1) @ keys
    o = o.reshape(n, heads, width)
    if gathered is not None:
        o = o + share[..., len(keys) : -1] @ gathered
    return o


def _window_mask(run: Run, first: int, window: int) -> np.ndarray:
    """(n, keys) bool for keys at positions from `first` to the run's last."""
    behind = np.arange(run.start, run.stop)[:, None] - np.arange(first, run.stop)
    return (behind >= 0) & (behind < window)


def _entry_mask(run: Run, ratio: int, entries: int) -> np.ndarray:
    visible = (np.arange(run.start, run.stop) + 1) // ratio
    return np.arange(entries) < visible[:, None]
