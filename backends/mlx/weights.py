"""Weights as MLX keeps them: the shared format's words as they are, no value changed.

Official FP4 is MLX's mxfp4, official FP8 becomes its mxfp8; both exactly.
"""

from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from ds4.quant.mxfp8 import GROUP, spread_scales
from ds4.weights.tensor import HostTensor


@dataclass(frozen=True)
class Packed:
    """A quantized matrix (out, in), or a stack of them: words (..., out, in * bits / 32)."""

    mode: str
    bits: int
    group: int
    words: mx.array  # uint32
    scales: mx.array  # (..., out, in / group), uint8 E8M0 or bfloat16
    biases: mx.array | None = None  # of affine only

    def matmul(self, x: mx.array) -> mx.array:
        """(..., T, in) -> (..., T, out)"""
        return mx.quantized_matmul(
            x,
            self.words,
            self.scales,
            self.biases,
            transpose=True,
            group_size=self.group,
            bits=self.bits,
            mode=self.mode,
        )

    def gather_matmul(self, x: mx.array, ids: mx.array) -> mx.array:
        """(..., 1, in) with matrix ids (...) -> (..., 1, out)"""
        return mx.gather_qmm(
            x,
            self.words,
            self.scales,
            self.biases,
            rhs_indices=ids,
            transpose=True,
            group_size=self.group,
            bits=self.bits,
            mode=self.mode,
        )

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


@dataclass(frozen=True)
class Plain:
    """The same for a matrix of BF16, F16 or F32 values."""

    values: mx.array  # (..., out, in)

    def matmul(self, x: mx.array) -> mx.array:
        return x @ self.values.swapaxes(-1, -2)

    def gather_matmul(self, x: mx.array, ids: mx.array) -> mx.array:
        matrices = self.values.astype(x.dtype).swapaxes(-1, -2)
        return mx.gather_mm(x, matrices, rhs_indices=ids)

    def rows(self, ids: mx.array) -> mx.array:
        return self.values[ids].astype(mx.float32)


Matrix = Packed | Plain
Weight = mx.array | Matrix


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
