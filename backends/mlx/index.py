"""The indexer: scores of visible entries and the best of them, tile by tile (spec 3.7)."""

import mlx.core as mx
import numpy as np

from .facts import Run
from .rows import Rows
from .weights import across

NEVER = -float("inf")
TILE = 8192  # entries scored and sorted at a time
PRODUCTS = 1 << 23  # float32 values of heads times entries at a time


def choose(
    q: mx.array, weights: mx.array, pool: Rows, run: Run, ratio: int, width: int
) -> mx.array:
    """(n, N, C) and (n, N) of one run -> int32 (n, width): entries, best first, -1 for none.

    Of equal scores the earlier entry wins: sorting is stable, in a tile and over the tiles' best.
    """
    entries = min(run.stop // ratio, pool.size)
    n, heads = weights.shape
    if not entries:
        return mx.full((n, width), -1, mx.int32)
    tile = min(TILE, entries)
    size = max(1, PRODUCTS // (heads * tile))
    blocks = []
    for first in range(0, n, size):
        part, rows = run.part(first, size), slice(first, first + size)
        blocks.append(_block(q[rows], weights[rows], pool, part, ratio, width))
        if n > size:
            mx.eval(blocks[-1])  # one block's products at a time
    return blocks[0] if len(blocks) == 1 else mx.concatenate(blocks)


def _block(
    q: mx.array, weights: mx.array, pool: Rows, run: Run, ratio: int, width: int
) -> mx.array:
    entries = min(run.stop // ratio, pool.size)
    found = []
    for at in range(0, entries, TILE):
        found.append(_tile(q, weights, pool, run, ratio, width, at, min(at + TILE, entries)))
        if run.length > 1 and entries > TILE:
            mx.eval(found[-1])  # one tile's products at a time; one token's are small
    scores, ids = found[0] if found else (mx.zeros((len(q), 0)), mx.zeros((len(q), 0), mx.int32))
    if len(found) > 1:
        scores, ids = (mx.concatenate(list(x), -1) for x in zip(*found, strict=True))
        best = mx.argsort(-scores, -1)[:, :width]
        scores, ids = (mx.take_along_axis(x, best, -1) for x in (scores, ids))
    if run.length > 1:
        ids = mx.where(scores == NEVER, -1, ids)
    missing = width - ids.shape[1]
    return mx.pad(ids, [(0, 0), (0, missing)], constant_values=-1) if missing else ids


def _tile(
    q: mx.array, weights: mx.array, pool: Rows, run: Run, ratio: int, width: int, at: int, end: int
) -> tuple[mx.array, mx.array]:
    """Scores and ids of the best `width` of entries `at` to `end`."""
    n, heads, channels = q.shape
    keys = pool.entries(run.slot, at, end).astype(mx.float32)
    products = mx.maximum(q.reshape(n * heads, channels) @ across(keys), 0).reshape(n, heads, -1)
    scores = (weights[:, None] @ products).squeeze(1)
    visible = (np.arange(run.start, run.stop) + 1) // ratio
    if visible[0] < end:
        hidden = np.arange(at, end) >= visible[:, None]
        scores = mx.where(mx.array(hidden), NEVER, scores)
    best = mx.argsort(-scores, -1)[:, :width]
    return mx.take_along_axis(scores, best, -1), best.astype(mx.int32) + at
