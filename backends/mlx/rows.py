"""Rings and pools: one name holds each buffer and a write replaces it, so MLX writes in place."""

from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from ds4.backend import CacheMode, RowKind

from .facts import Ints, rotate
from .rounding import round_index, round_kv


@dataclass
class Rows:
    """Rows for each of some sequences, rounded as the cache mode says when stored."""

    kind: RowKind
    mode: CacheMode
    data: mx.array  # (slots, size + 1, width): the last row takes what padding writes
    rotary: int

    @property
    def size(self) -> int:
        return self.data.shape[1] - 1

    def rounded(self, rows: mx.array) -> mx.array:
        """As a stored row is: of kind "index" also after its Hadamard transform."""
        if self.mode == "exact" or self.kind == "float":
            return rows
        return round_kv(rows, self.rotary) if self.kind == "kv" else round_index(rows)

    def store(self, slot: Ints, at: Ints, rows: mx.array) -> None:
        """Put (n, width) rows, already rounded, at (slot, at) of the host."""
        if not len(at):
            return
        first, n = int(at[0]), len(at)
        if int(at[-1]) == first + n - 1 and (slot == slot[0]).all() and (np.diff(at) == 1).all():
            self.data[int(slot[0]), first : first + n] = rows
        else:
            self.data[mx.array(slot), mx.array(at)] = rows

    def recent(self, slot: int, first: int, end: int) -> mx.array:
        """(end - first, width): positions of a ring, which must hold them."""
        a, b = first % self.size, (end - 1) % self.size + 1
        if a < b:
            return self.data[slot, a:b]
        return mx.concatenate([self.data[slot, a : self.size], self.data[slot, :b]])

    def chosen(self, slot: int, ids: mx.array) -> mx.array:
        """(..., width): entries of a pool by number. Of a slice, MLX would first copy the pool."""
        flat = self.data.flatten(0, 1)
        rows: mx.array = flat[ids + slot * (self.size + 1) if slot else ids]
        return rows


def row(x: mx.array, norm: mx.array, turn: mx.array, eps: float, rounded: bool) -> mx.array:
    """(T, C) -> (T, C) as a window stores it: normed, turned, and rounded if so."""
    turned = rotate(mx.fast.rms_norm(x, norm, eps), turn)
    return round_kv(turned, 2 * turn.shape[1]) if rounded else turned
