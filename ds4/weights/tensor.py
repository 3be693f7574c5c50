"""A weight as it lies in a file: bytes, and what they mean."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..quant import formats
from ..quant.affine import decode_affine
from ..quant.mxfp8 import decode_mxfp8

Array = NDArray[Any]


@dataclass(frozen=True)
class HostTensor:
    """One weight in host memory.

    format  data                            scales
    f32     float32 (...)                   None
    f16     float16 (...)                   None
    bf16    uint16 bit patterns (...)       None
    int     int64 or int32 (...)            None
    fp8     uint8 e4m3 (..., out, in)       uint8 E8M0 (..., ceil(out/128), ceil(in/128))
    mxfp4   uint8 (..., out, in/2)          uint8 E8M0 (..., out, in/32)
    mxfp8   uint8 e4m3 (..., out, in)       uint8 E8M0 (..., out, in/32)
    affine  uint32 (..., out, in*bits/32)   uint16 bf16 patterns (..., out, in/group)

    Only affine has biases, shaped and typed like its scales, bits and group.
    """

    format: str
    data: Array
    scales: Array | None = None
    biases: Array | None = None
    bits: int = 0
    group: int = 0

    @property
    def shape(self) -> tuple[int, ...]:
        """The logical shape: MXFP4 holds two values a byte, affine 32 values in `bits` words."""
        *head, last = self.data.shape
        if self.format == "affine":
            return (*head, last * 32 // self.bits)
        return (*head, 2 * last if self.format == "mxfp4" else last)

    @property
    def kind(self) -> tuple[str, int, int]:
        """What tensors must have in common to be joined."""
        return self.format, self.bits, self.group

    @property
    def nbytes(self) -> int:
        return sum(x.nbytes for x in (self.data, self.scales, self.biases) if x is not None)

    def decode(self) -> Array:
        """The values: float32, or the integers as they are."""
        if self.format == "int":
            return self.data
        if self.format == "bf16":
            return formats.decode_bf16(self.data)
        if self.scales is None:
            return np.asarray(self.data, np.float32)
        if self.biases is not None:
            return decode_affine(self.data, self.scales, self.biases, self.bits, self.group)
        return _DECODERS[self.format](self.data, self.scales)

    def map(self, change: Callable[[Array], Array]) -> "HostTensor":
        """The same tensor with `change` made to its data, its scales and its biases."""
        scales, biases = (None if x is None else change(x) for x in (self.scales, self.biases))
        return replace(self, data=change(self.data), scales=scales, biases=biases)


_DECODERS = {
    "fp8": formats.decode_fp8,
    "mxfp4": formats.decode_mxfp4,
    "mxfp8": decode_mxfp8,
}


def stack(tensors: list[HostTensor]) -> HostTensor:
    """Equal-shaped tensors of one format -> one with a new first axis."""
    return _combine(tensors, np.stack)


def concatenate(tensors: list[HostTensor], axis: int = 0) -> HostTensor:
    """Tensors of one format joined along `axis`; FP8 parts must end on a block of 128."""
    return _combine(tensors, lambda arrays: np.concatenate(arrays, axis))


def _combine(tensors: list[HostTensor], join: Any) -> HostTensor:
    first = tensors[0]
    if any(t.kind != first.kind for t in tensors):
        raise ValueError(f"cannot join {sorted({t.kind for t in tensors})} into one tensor")
    scales = None if first.scales is None else join([t.scales for t in tensors])
    biases = None if first.biases is None else join([t.biases for t in tensors])
    return replace(first, data=join([t.data for t in tensors]), scales=scales, biases=biases)
