"""A weight as it lies in a file: bytes, and what they mean."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..quant import formats

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
    """

    format: str
    data: Array
    scales: Array | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """The logical shape: MXFP4 holds two values a byte."""
        *head, last = self.data.shape
        return (*head, 2 * last if self.format == "mxfp4" else last)

    @property
    def nbytes(self) -> int:
        return self.data.nbytes + (0 if self.scales is None else self.scales.nbytes)

    def decode(self) -> Array:
        """The values: float32, or the integers as they are."""
        if self.format == "int":
            return self.data
        if self.format == "bf16":
            return formats.decode_bf16(self.data)
        if self.scales is None:
            return np.asarray(self.data, np.float32)
        return {"fp8": formats.decode_fp8, "mxfp4": formats.decode_mxfp4}[self.format](
            self.data, self.scales
        )


def stack(tensors: list[HostTensor]) -> HostTensor:
    """Equal-shaped tensors of one format -> one with a new first axis."""
    return _combine(tensors, np.stack)


def concatenate(tensors: list[HostTensor], axis: int = 0) -> HostTensor:
    """Tensors of one format joined along `axis`; FP8 parts must end on a block of 128."""
    return _combine(tensors, lambda arrays: np.concatenate(arrays, axis))


def _combine(tensors: list[HostTensor], join: Any) -> HostTensor:
    first = tensors[0]
    if any(t.format != first.format for t in tensors):
        raise ValueError(f"cannot join {sorted({t.format for t in tensors})} into one tensor")
    scales = None if first.scales is None else join([t.scales for t in tensors])
    return HostTensor(first.format, join([t.data for t in tensors]), scales)
