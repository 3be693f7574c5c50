"""Finished blocks pooled into entries (spec 3.6)."""

from typing import Any

import mlx.core as mx
import numpy as np

from ds4.backend import Weights

from .facts import Facts, rotation
from .rows import Form, Rows, row

NEVER = -float("inf")


def finish(
    make: Any,
    w: Weights,
    ring: Rows,
    pool: Rows,
    facts: Facts,
    freqs: mx.array,
    ratio: int,
    eps: float,
) -> None:
    """Pool each block that this step completes; `make` is `entry` or the kernel that does it."""
    slot, block = facts.blocks(ratio).T
    if not len(block):
        return

    def numbers() -> mx.array:
        at = block[:, None] * ratio + np.arange(-ratio if ratio == 4 else 0, ratio)
        rows = slot[:, None] * (ring.size + 1) + at % ring.size
        return mx.array(np.where(at < 0, -1, rows).astype(np.int32))

    rows = facts.keep(("rows", ratio, ring.size), numbers)
    turn = facts.keep(("turns", id(freqs), ratio), lambda: mx.array(rotation(block * ratio, freqs)))
    flat = ring.data.flatten(0, 1)
    pool.store(slot, block, make(flat, rows, w.ape.values, w.norm, turn, eps, pool.form))


def entry(
    ring: mx.array,
    rows: mx.array,
    ape: mx.array,
    norm: mx.array,
    turn: mx.array,
    eps: float,
    form: Form,
) -> mx.array:
    """`rows` (E, n), numbers of rows [K | gate] of `ring`, -1 for none -> entries (E, C).

    With n twice the ratio, that is len(ape), the first half of the rows are the block before: it
    shows its first half of channels, the own block its second.
    """
    ratio, width = len(ape), norm.size
    kv, gate = mx.split(ring[mx.maximum(rows, 0)], 2, -1)
    gate = gate + (ape if rows.shape[1] == ratio else mx.concatenate([ape, ape]))
    if rows.shape[1] > ratio:
        kv = mx.concatenate([kv[:, :ratio, :width], kv[:, ratio:, width:]], 1)
        gate = mx.concatenate([gate[:, :ratio, :width], gate[:, ratio:, width:]], 1)
    seen = (rows >= 0)[:, :, None]
    share = mx.softmax(mx.where(seen, gate, NEVER), 1)
    return row((mx.where(seen, kv, 0) * share).sum(1), norm, turn, eps, form)
