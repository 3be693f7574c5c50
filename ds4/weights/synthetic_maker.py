"""What the laws of synthetic tensors ask of an array library, and NumPy's answer."""

from typing import Any, Protocol

import numpy as np

from ..quant import formats
from .tensor import Array


class Maker(Protocol):
    """The arrays of NumPy or another library, as far as they are not alike."""

    def empty(self, nbytes: int) -> Any:
        """A flat uint8 array of any contents."""

    def count(self, first: int, stop: int) -> Any:
        """int32 first, first + 1, ... stop - 1."""

    def as_bytes(self, x: Any) -> Any:
        """The memory of a flat array as uint8."""

    def as_floats(self, x: Any) -> Any:
        """int32 bit patterns as float32."""

    def to_floats(self, x: Any) -> Any:
        """int32 numbers as float32."""

    def to_bf16(self, x: Any) -> Any:
        """float32 to bfloat16, ties to even, as an array of two bytes an element."""


class Numpy:
    """NumPy as a Maker."""

    def empty(self, nbytes: int) -> Array:
        return np.empty(nbytes, np.uint8)

    def count(self, first: int, stop: int) -> Array:
        return np.arange(first, stop, dtype=np.int32)

    def as_bytes(self, x: Array) -> Array:
        return x.view(np.uint8)

    def as_floats(self, x: Array) -> Array:
        return x.view(np.float32)

    def to_floats(self, x: Array) -> Array:
        return x.astype(np.float32)

    def to_bf16(self, x: Array) -> Array:
        return formats.encode_bf16(x)
