"""What each tensor of a recipe's checkpoint is stored as, and how its values get there."""

from dataclasses import dataclass
from typing import Literal

import numpy as np

from ..errors import QuantizeError
from ..weights.layout import Layout
from ..weights.quantization import Packing
from ..weights.tensor import Array, HostTensor
from .affine import encode_affine
from .arrays import CPU, Arrays
from .formats import encode_bf16, encode_mxfp4
from .least_squares import encode_least_squares
from .mxfp8 import GROUP, encode_mxfp8, spread_scales
from .recipes import Format

Method = Literal["ls", "gptq", "rtn"]
METHODS: tuple[Method, ...] = ("ls", "gptq", "rtn")

_PLAIN = {"f32": "F32", "f16": "F16", "bf16": "BF16"}


@dataclass(frozen=True)
class Storage:
    """How a tensor is stored: a HostTensor format, with affine's bits and group."""

    format: str
    bits: int = 0
    group: int = 0
    dtype: str = ""  # of the data in a safetensors file, for plain tensors

    @property
    def packing(self) -> Packing | None:
        """What config.json says of it; None for a tensor that is not packed."""
        return None if self.dtype else Packing(self.format, self.bits, self.group)

    def parts(self, shape: tuple[int, ...]) -> list[tuple[str, str, tuple[int, ...]]]:
        """(leaf, safetensors dtype, shape) of each part of a tensor of this logical shape."""
        if self.dtype:
            return [("weight", self.dtype, shape)]
        *head, columns = shape
        grid = (*head, columns // self.group)
        words = ("weight", "U32", (*head, columns * self.bits // 32))
        if self.format == "affine":
            return [words, ("scales", "BF16", grid), ("biases", "BF16", grid)]
        return [words, ("scales", "U8", grid)]


MXFP4 = Storage("mxfp4", 4, 32)
MXFP8 = Storage("mxfp8", 8, 32)
BF16 = Storage("bf16", dtype="BF16")


def choose(source: Layout, wanted: Format | None, columns: int) -> Storage:
    """How to store a tensor that the recipe wants in a format; None for as it is shipped.

    Native FP4 stays at four bits and more: anything else would be larger and no better. FP8 as
    shipped becomes MXFP8, or BF16 where no group fits; both hold the same values.
    """
    if source.format == "affine":
        raise QuantizeError(
            f"{source.data}: is already quantized to {source.bits} bits; "
            "quantize the checkpoint that it was made from"
        )
    if source.format == "mxfp4" and (wanted is None or wanted.bits >= 4):
        return MXFP4
    if source.format in ("fp8", "mxfp8") and (wanted is None or wanted.mode == "mxfp8"):
        return MXFP8 if columns % GROUP == 0 else BF16
    if wanted is None:
        plain = _PLAIN.get(source.format) or source.data.dtype
        return Storage(source.format, dtype=plain)
    if wanted.mode in _PLAIN:
        return Storage(wanted.mode, dtype=_PLAIN[wanted.mode])
    return Storage(wanted.mode, wanted.bits, wanted.group)


def convert(
    tensor: HostTensor,
    storage: Storage,
    method: Method,
    importance: Array | None = None,
    on: Arrays = CPU,
) -> HostTensor:
    """A tensor as `storage` has it; no value changes where both can hold it.

    `importance` (K,), or (B, 1, K) for B stacked matrices, not negative, weighs the squared error
    of each input. Affine codes are looked
    for by rounding or by least squares: what GPTQ needs is more than one tensor, see encoder.py.
    """
    if tensor.format == storage.format:
        return tensor
    if tensor.format == "fp8" and storage.format == "mxfp8":
        assert tensor.scales is not None
        return HostTensor("mxfp8", tensor.data, spread_scales(tensor.scales, *tensor.shape))
    if storage.format == "affine":
        bits, group, values = storage.bits, storage.group, on.decode(tensor)
        if method == "rtn":
            encoded = encode_affine(values, bits, group, on)
        else:
            weights = None if importance is None else on.put(positive(importance))
            encoded = encode_least_squares(values, bits, group, weights, on)
        return HostTensor("affine", *encoded, bits, group)
    values = tensor.decode()
    if storage.format == "f32":
        return HostTensor("f32", values)
    if storage.format == "bf16":
        return HostTensor("bf16", encode_bf16(values))
    encode = {"mxfp4": encode_mxfp4, "mxfp8": encode_mxfp8}[storage.format]
    return HostTensor(storage.format, *encode(values))


def positive(importance: Array) -> Array:
    """float32, at least a thousandth of the mean: no input is worth nothing."""
    x = np.asarray(importance, np.float32)
    mean = x.mean(-1, keepdims=True)
    return np.maximum(x / np.where(mean > 0, mean, 1), np.float32(1e-3))
