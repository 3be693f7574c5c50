"""Weights as MLX keeps them: the shared format's words as they are, no value changed.

Official FP4 is MLX's mxfp4, official FP8 becomes its mxfp8; both exactly.
"""

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx
import numpy as np

from ds4.quant.mxfp8 import GROUP, spread_scales
from ds4.weights.tensor import HostTensor

JOINED_SIZE = 1 << 24  # weights from which a matrix fills the machine alone


@dataclass
class Packed:
    """A quantized matrix (out, in), or a stack of them: words (..., out, in * bits / 32)."""

    mode: str
    bits: int
    group: int
    words: mx.array  # uint32
    scales: mx.array  # (..., out, in / group), uint8 E8M0 or bfloat16
    biases: mx.array | None = None  # of affine only
    partners: dict[Any, Any] = field(default_factory=dict, init=False, repr=False)

    @property
    def kind(self) -> tuple[Any, ...]:
        """What matrices must have in common to be joined."""
        return self.mode, self.bits, self.group, self.words.shape[:-2], self.words.shape[-1]

    @property
    def rows_out(self) -> int:
        return int(self.words.shape[-2])

    @property
    def size(self) -> int:
        return int(self.words.size) * 32 // self.bits

    def matmul(self, x: mx.array) -> mx.array:
        """(..., T, in) -> (..., T, out)"""
        return mx.quantized_matmul(self._fitting(x), *self._arrays, **self._format).astype(x.dtype)

    def gather_matmul(self, x: mx.array, ids: mx.array, ordered: bool = False) -> mx.array:
        """(..., 1, in) with matrix ids (...), `ordered` if they ascend -> (..., 1, out)"""
        y = mx.gather_qmm(
            self._fitting(x),
            *self._arrays,
            lhs_indices=_numbers(x.shape[:-2]),
            rhs_indices=ids,
            sorted_indices=ordered,
            **self._format,
        )
        return y.astype(x.dtype)

    def _fitting(self, x: mx.array) -> mx.array:
        """Affine scales are bfloat16: beside float32, MLX would convert them all at each use."""
        gpu = mx.default_device().type == mx.DeviceType.gpu
        return x.astype(mx.bfloat16) if gpu and self.biases is not None else x

    @property
    def _arrays(self) -> tuple[mx.array, mx.array, mx.array | None]:
        return self.words, self.scales, self.biases

    @property
    def _format(self) -> dict[str, Any]:
        return {"transpose": True, "group_size": self.group, "bits": self.bits, "mode": self.mode}

    def rows(self, ids: mx.array) -> mx.array:
        """(T,) -> (T, in): those rows of a matrix, float32."""
        scales, biases = self.scales[ids], self.biases
        if biases is not None:  # in float32 the sum rounds once
            scales, biases = scales.astype(mx.float32), biases[ids].astype(mx.float32)
        words = self.words[ids]
        return mx.dequantize(
            words,
            scales,
            biases,
            group_size=self.group,
            bits=self.bits,
            mode=self.mode,
            dtype=mx.float32,
        )

    def join(self, others: Sequence["Packed"]) -> "Packed":
        """One matrix of this one's rows and theirs; each becomes a view of it."""
        parts = [self, *others]
        names = ("words", "scales", *(["biases"] if self.biases is not None else []))
        arrays = {name: _stacked([getattr(part, name) for part in parts]) for name in names}
        for name, whole in arrays.items():
            _become_views(parts, name, whole)
        return Packed(self.mode, self.bits, self.group, **arrays)


@dataclass
class Plain:
    """The same for a matrix of BF16, F16 or F32 values."""

    values: mx.array  # (..., out, in)
    partners: dict[Any, Any] = field(default_factory=dict, init=False, repr=False)
    _across: mx.array | None = field(default=None, init=False, repr=False)

    @property
    def across(self) -> mx.array:
        """(..., in, out): a view on a GPU; on a CPU laid out so, from the first use on.

        The BLAS in MLX's Linux wheel multiplies by rows twice as fast as by columns.
        """
        if self._across is None:
            self._across = across(self.values)
            mx.eval(self._across)
            self.values = self._across.swapaxes(-1, -2)
            mx.eval(self.values)
        return self._across

    @property
    def kind(self) -> tuple[Any, ...]:
        return self.values.dtype, self.values.shape[:-2], self.values.shape[-1]

    @property
    def rows_out(self) -> int:
        return int(self.values.shape[-2])

    @property
    def size(self) -> int:
        return int(self.values.size)

    def matmul(self, x: mx.array) -> mx.array:
        return x @ self.across

    def gather_matmul(self, x: mx.array, ids: mx.array, ordered: bool = False) -> mx.array:
        matrices = self.across.astype(x.dtype)
        left = _numbers(x.shape[:-2])
        return mx.gather_mm(x, matrices, lhs_indices=left, rhs_indices=ids, sorted_indices=ordered)

    def rows(self, ids: mx.array) -> mx.array:
        return self.values[ids].astype(mx.float32)

    def join(self, others: Sequence["Plain"]) -> "Plain":
        parts = [self, *others]
        whole = Plain(_stacked([part.values for part in parts]))
        assert whole.across is not None  # laid out before the parts become views of it
        _become_views(parts, "values", whole.values)
        return whole


Matrix = Packed | Plain
Weight = mx.array | Matrix


@functools.lru_cache(64)
def _numbers(shape: tuple[int, ...]) -> mx.array:
    """uint32: which matrix of x a product takes, made once and not in every graph."""
    numbers = mx.arange(math.prod(shape), dtype=mx.uint32).reshape(shape)
    mx.eval(numbers)
    return numbers


def across(x: mx.array) -> mx.array:
    """Its last two axes exchanged, and on a CPU laid out so: see Plain.across."""
    turned = x.swapaxes(-1, -2)
    return mx.contiguous(turned) if mx.default_device().type == mx.DeviceType.cpu else turned


def _stacked(arrays: list[mx.array]) -> mx.array:
    """Rows below rows."""
    whole = mx.concatenate(arrays, -2)
    mx.eval(whole)
    return whole


def _become_views(parts: Sequence[Any], name: str, whole: mx.array) -> None:
    """Let go of the parts' own arrays, so that memory holds them once."""
    at = 0
    for part in parts:
        rows = part.rows_out
        view = whole[..., at : at + rows, :]
        mx.eval(view)
        setattr(part, name, view)
        at += rows


def joined(first: Matrix, *others: Matrix) -> Matrix:
    """Matrices of one kind as one, made at the first use and kept with the first of them."""
    key = tuple(id(other) for other in others)
    if key not in first.partners:
        first.partners[key] = first.join(others), others  # type: ignore[arg-type]
        mx.clear_cache()  # the parts' own arrays: experts are large
    matrix: Matrix = first.partners[key][0]
    return matrix


@dataclass(frozen=True)
class Beside:
    """Two matrices of different kinds, multiplied one after the other."""

    first: Matrix
    second: Matrix

    def matmul(self, x: mx.array) -> mx.array:
        return mx.concatenate([self.first.matmul(x), self.second.matmul(x)], -1)

    def gather_matmul(self, x: mx.array, ids: mx.array, ordered: bool = False) -> mx.array:
        each = (m.gather_matmul(x, ids, ordered) for m in (self.first, self.second))
        return mx.concatenate(list(each), -1)


def one_over_the_other(first: Matrix, second: Matrix) -> Matrix | Beside:
    """The rows of both as one matrix, if they are of one kind."""
    alike = (type(first), first.kind) == (type(second), second.kind)
    return joined(first, second) if alike else Beside(first, second)


def groups(matrices: Sequence[Matrix]) -> list[list[int]]:
    """Which of these to multiply together: those of one kind that are not large by themselves."""
    found: dict[Any, list[int]] = {}
    for i, matrix in enumerate(matrices):
        alone = matrix.size >= JOINED_SIZE
        found.setdefault((type(matrix), matrix.kind, i if alone else -1), []).append(i)
    return list(found.values())


def upload(tensor: HostTensor, device: str) -> Weight:
    """Packed on a GPU; float32 on the CPU, where decoding takes longer than reading."""
    if device == "cpu" and tensor.format != "int":
        tensor = HostTensor("f32", tensor.decode())
    return pack(tensor)


def pack(tensor: HostTensor) -> Weight:
    """Vectors and integers become arrays, matrices Plain or Packed."""
    if tensor.scales is not None and tensor.shape[-1] % GROUP == 0:
        return _packed(tensor)
    if tensor.scales is not None:
        return Plain(mx.array(tensor.decode()))
    data = mx.array(tensor.data)
    if tensor.format == "bf16":
        data = data.view(mx.bfloat16)
    if tensor.format == "int":
        return data.astype(mx.int32)
    return data.astype(mx.float32) if data.ndim == 1 else Plain(data)


def _packed(tensor: HostTensor) -> Packed:
    words = mx.array(np.ascontiguousarray(tensor.data).view(np.uint32))
    scales = tensor.scales
    assert scales is not None
    if tensor.biases is not None:
        bf16 = (mx.array(x).view(mx.bfloat16) for x in (scales, tensor.biases))
        return Packed("affine", tensor.bits, tensor.group, words, *bf16)
    if tensor.format == "mxfp4":
        return Packed("mxfp4", 4, GROUP, words, mx.array(scales))
    if tensor.format == "fp8":
        scales = spread_scales(scales, *tensor.shape[-2:])
    return Packed("mxfp8", 8, GROUP, words, mx.array(scales))
