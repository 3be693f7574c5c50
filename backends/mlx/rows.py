"""Rings and pools: one name holds each buffer and a write replaces it, so MLX writes in place."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from ds4.backend import CacheMode, RowKind, RowRange
from ds4.quant.rows import RowFormat

from .facts import Ints, rotate
from .packing import packed, unpacked
from .rounding import round_index, round_kv

Form = Literal["as it is", "kv", "index"]
FORMS: tuple[Form, ...] = get_args(Form)


@dataclass
class Rows:
    """Rows for each of some sequences, rounded as the cache mode says when stored."""

    kind: RowKind
    mode: CacheMode
    data: mx.array  # (slots, size + 1, width): the last row takes what padding writes
    rotary: int

    @classmethod
    def zeros(
        cls, kind: RowKind, mode: CacheMode, slots: int, size: int, width: int, rotary: int
    ) -> "Rows":
        """bf16 where rows are rounded: it holds their FP8 and FP4 grids exactly. Else float32."""
        rounded = mode == "native" and kind != "float"
        dtype = mx.bfloat16 if rounded else mx.float32
        return cls(kind, mode, mx.zeros((slots, size + 1, width), dtype), rotary)

    @property
    def size(self) -> int:
        return self.data.shape[1] - 1

    @property
    def form(self) -> Form:
        """How a row is rounded before it is stored."""
        return "as it is" if self.mode == "exact" or self.kind == "float" else self.kind

    @property
    def format(self) -> RowFormat:
        """A row's packed form."""
        kind = "float" if self.mode == "exact" else self.kind
        return RowFormat(kind, self.data.shape[2], self.rotary)

    def store(self, slot: Ints, at: Ints, rows: mx.array) -> None:
        """Put (n, width) rows, already rounded, at (slot, at) of the host."""
        if not len(at):
            return
        first, n, rows = int(at[0]), len(at), rows.astype(self.data.dtype)
        if int(at[-1]) == first + n - 1 and (slot == slot[0]).all() and (np.diff(at) == 1).all():
            self.data[int(slot[0]), first : first + n] = rows
        else:
            self.data[mx.array(slot), mx.array(at)] = rows

    def recent(self, slot: int, first: int, end: int) -> mx.array:
        """(end - first, width) as stored: positions of a ring, which must hold them."""
        a, b = first % self.size, (end - 1) % self.size + 1
        if a < b:
            return self.data[slot, a:b]
        return mx.concatenate([self.data[slot, a : self.size], self.data[slot, :b]])

    def chosen(self, slot: int, ids: mx.array) -> mx.array:
        """(..., width) as stored: entries by number. Of a slice, MLX would first copy the pool."""
        flat = self.data.flatten(0, 1)
        rows: mx.array = flat[ids + slot * (self.size + 1) if slot else ids]
        return rows

    def entries(self, slot: int, first: int, end: int) -> mx.array:
        """(end - first, width) as stored: entries of a pool."""
        rows: mx.array = self.data[slot, first:end]
        return rows


def row(x: mx.array, norm: mx.array | None, turn: mx.array, eps: float, form: Form) -> mx.array:
    """(T, ..., C) normed with weights (C,) if given, turned by (T, rotary / 2), and rounded."""
    x = x if norm is None else mx.fast.rms_norm(x, norm, eps)
    return rounded(rotate(x, turn), 2 * turn.shape[1], form)


def rounded(rows: mx.array, rotary: int, form: Form) -> mx.array:
    """As a row of that form is stored: an index row also after its Hadamard transform."""
    if form == "kv":
        return round_kv(rows, rotary)
    return round_index(rows) if form == "index" else rows


# rows as bytes, and from slot to slot


def export_rows(slot: int, ranges: Sequence[RowRange]) -> NDArray[np.uint8]:
    """Range after range, each row in its packed form."""
    parts = [packed(_values(r, slot), r.rows.format).flatten() for r in ranges]
    return np.array(mx.concatenate([mx.zeros(0, mx.uint8), *parts]))


def _values(r: RowRange, slot: int) -> mx.array:
    values: mx.array = r.rows.data[slot, r.start : r.stop].astype(mx.float32)
    return values


def restore_rows(slot: int, ranges: Sequence[RowRange], data: NDArray[np.uint8]) -> None:
    """Put exported rows into a slot; their memory is not needed afterwards."""
    at = 0
    for r in ranges:
        form, count = r.rows.format, r.stop - r.start
        end = at + count * form.row_bytes
        part = mx.array(data[at:end].reshape(count, -1))
        r.rows.data[slot, r.start : r.stop] = unpacked(part, form).astype(r.rows.data.dtype)
        at = end
    mx.eval([r.rows.data for r in ranges])


def copy_rows(source: int, target: int, ranges: Sequence[RowRange]) -> None:
    """Rows of one slot into another; read before written, so that MLX writes in place."""
    for r in ranges:
        values = mx.contiguous(r.rows.data[source, r.start : r.stop])
        mx.eval(values)
        r.rows.data[target, r.start : r.stop] = values
