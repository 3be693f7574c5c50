"""Weights as MLX keeps them: official FP4 is its mxfp4, official FP8 becomes its mxfp8, exactly."""

from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from ds4.quant import formats
from ds4.weights.tensor import HostTensor

GROUP = 32  # inputs a scale, in both modes


@dataclass(frozen=True)
class Packed:
    """A quantized matrix (out, in), or a stack of them: words (..., out, in * bits / 32)."""

    mode: str
    words: mx.array  # uint32
    scales: mx.array  # uint8 E8M0 (..., out, in / 32)

    def matmul(self, x: mx.array) -> mx.array:
        """(..., T, in) -> (..., T, out)"""
        return mx.quantized_matmul(
            x, self.words, self.scales, transpose=True, group_size=GROUP, mode=self.mode
        )

    def gather_matmul(self, x: mx.array, ids: mx.array) -> mx.array:
        """(..., 1, in) with matrix ids (...) -> (..., 1, out)"""
        return mx.gather_qmm(
            x,
            self.words,
            self.scales,
            rhs_indices=ids,
            transpose=True,
            group_size=GROUP,
            mode=self.mode,
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
    assert tensor.scales is not None
    if tensor.format == "mxfp4":
        return Packed("mxfp4", words, mx.array(tensor.scales))
    rows, columns = tensor.shape[-2:]
    scales = tensor.scales.repeat(formats.FP8_BLOCK, -2)[..., :rows, :]
    scales = scales.repeat(formats.FP8_BLOCK // GROUP, -1)[..., : columns // GROUP]
    return Packed("mxfp8", words, mx.array(scales))
