"""Finished blocks pooled into entries (spec 3.6)."""

import mlx.core as mx
import numpy as np

from ds4.backend import Weights

from .facts import Facts, rotate, rotation
from .rows import Rows

NEVER = -float("inf")


def finish(
    w: Weights, ring: Rows, pool: Rows, facts: Facts, freqs: mx.array, ratio: int, eps: float
) -> None:
    """Pool each block that this step completes, from its rows in the ring."""
    slot, block = facts.blocks(ratio).T
    if not len(block):
        return
    width, overlaps = pool.data.shape[-1], ratio == 4
    before = ratio if overlaps else 0
    at = block[:, None] * ratio + np.arange(-before, ratio)
    kv, gate = mx.split(_rows(ring, slot, at), 2, -1)
    if overlaps:  # the earlier block shows its first half of channels, the own block its second
        kv = mx.concatenate([kv[:, :before, :width], kv[:, before:, width:]], 1)
        gate = mx.concatenate([gate[:, :before, :width], gate[:, before:, width:]], 1)
    gate = gate + _bias(w.ape.values, width, overlaps)
    if (at < 0).any():
        unseen = mx.array((at < 0)[:, :, None])
        kv, gate = mx.where(unseen, 0, kv), mx.where(unseen, NEVER, gate)
    entry = mx.fast.rms_norm((kv * mx.softmax(gate, 1)).sum(1), w.norm, eps)
    key = "entries", id(freqs), ratio
    turn = facts.keep(key, lambda: mx.array(rotation(block * ratio, freqs)))
    pool.store(slot, block, pool.rounded(rotate(entry, turn)))


def _rows(ring: Rows, slot: np.ndarray, at: np.ndarray) -> mx.array:
    """(E, n, width): positions of a ring, those before 0 whatever they are."""
    if len(at) == 1 and at[0, 0] >= 0:
        return ring.recent(int(slot[0]), int(at[0, 0]), int(at[0, -1]) + 1)[None]
    return ring.data[mx.array(slot[:, None]), mx.array(at % ring.size)]


def _bias(ape: mx.array, width: int, overlaps: bool) -> mx.array:
    """What is added to the gates of a block, and of the one before it."""
    return mx.concatenate([ape[:, :width], ape[:, width:]]) if overlaps else ape
