"""How one weight is stored: its number format, and which values are refused.

Formats: specification 2.3. A matrix may be FP8 or packed FP4 with a scale tensor beside it, packed
into U32 words with scales (and biases) as config.json describes, or plain BF16, F16 or F32;
everything else is plain, and routing tables are integers.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NoReturn

import numpy as np

from ..errors import CheckpointError
from ..json_fields import AGAIN
from ..quant.formats import E8M0_NAN, FP4_GROUP, FP8_BLOCK
from .names import Shape, is_matrix
from .quantization import Quantization
from .shards import Stored
from .tensor import Array, HostTensor

_FLOATS: dict[str, tuple[str, Any]] = {
    "F32": ("f32", np.float32),
    "F16": ("f16", np.float16),
    "BF16": ("bf16", np.uint16),
}
_INTEGERS: dict[str, Any] = {"I64": np.int64, "I32": np.int32}
_PACKED_FP4 = ("I8", "U8", "F4")
_E8M0 = ("F8_E8M0", "U8")
_CHUNK = 1 << 18  # values checked at a time: temporaries stay in the cache


@dataclass(frozen=True)
class Layout:
    """Where a weight lies, and the arrays of the HostTensor that it becomes."""

    format: str
    dtype: Any
    shape: Shape  # of the data: FP4 is packed two values a byte
    scale_shape: Shape | None
    data: Stored
    scales: Stored | None
    biases: Stored | None = None
    bits: int = 0
    group: int = 0

    @property
    def kind(self) -> tuple[str, int, int]:
        return self.format, self.bits, self.group

    @property
    def nbytes(self) -> int:
        return sum(x.nbytes for x in (self.data, self.scales, self.biases) if x is not None)

    def empty(self, *stack: int) -> HostTensor:
        """A HostTensor of such weights, stacked along new first axes, to be filled."""
        data, scales, biases = np.empty((*stack, *self.shape), self.dtype), None, None
        if self.scale_shape is not None:
            scale_type = np.uint16 if self.format == "affine" else np.uint8
            scales = np.empty((*stack, *self.scale_shape), scale_type)
            biases = None if self.biases is None else np.empty_like(scales)
        return HostTensor(self.format, data, scales, biases, self.bits, self.group)

    def parts(self, tensor: HostTensor) -> Iterator[tuple[Stored, Array]]:
        """Each stored part, with the array of the tensor that it fills."""
        yield self.data, tensor.data
        if self.scales is not None and tensor.scales is not None:
            yield self.scales, tensor.scales
        if self.biases is not None and tensor.biases is not None:
            yield self.biases, tensor.biases


def find_layout(
    name: str,
    shape: Shape,
    data: Stored,
    scale: Stored | None,
    scales: Stored | None,
    biases: Stored | None,
    quantization: Quantization,
) -> Layout:
    """The Layout of an official tensor of this logical shape; refused if it does not fit.

    `scale` is DeepSeek's, `scales` and `biases` are the shared format's.
    """
    if data.dtype == "U32" and (is_matrix(name, shape) or name == "embed.weight"):
        _unwanted(data, scale)
        return _packed(shape, data, scales, biases, quantization)
    _unwanted(data, scales, biases)
    if quantization.says(data.name.removesuffix(".weight")):
        _refuse(data, f"U32 ({quantization.of(data.name.removesuffix('.weight'))})", shape)
    if name.endswith("tid2eid"):
        if data.dtype not in _INTEGERS:
            _refuse(data, "I64 or I32", shape)
        return _plain("int", _INTEGERS[data.dtype], shape, data, scale)
    if data.dtype in _FLOATS:
        return _plain(*_FLOATS[data.dtype], shape, data, scale)
    if is_matrix(name, shape) and data.dtype == "F8_E4M3":
        blocks = tuple(-(-n // FP8_BLOCK) for n in shape)
        return _scaled("fp8", shape, blocks, shape, data, scale)
    if is_matrix(name, shape) and data.dtype in _PACKED_FP4:
        rows, columns = shape
        packed, groups = (rows, columns // 2), (rows, columns // FP4_GROUP)
        if columns % FP4_GROUP:
            _refuse(data, "F8_E4M3, BF16, F16 or F32 (FP4 takes multiples of 32)", shape)
        return _scaled("mxfp4", packed, groups, shape, data, scale)
    _refuse(data, _wanted(name, shape), shape)


def _wanted(name: str, shape: Shape) -> str:
    quantised = "F8_E4M3, I8 (packed FP4), " if is_matrix(name, shape) else ""
    return f"{quantised}BF16, F16 or F32"


def _plain(kind: str, dtype: Any, shape: Shape, data: Stored, scale: Stored | None) -> Layout:
    if data.shape != shape:
        _refuse(data, data.dtype, shape)
    _unwanted(data, scale)
    return Layout(kind, dtype, shape, None, data, None)


def _unwanted(data: Stored, *beside: Stored | None) -> None:
    for part in beside:
        if part is not None:
            raise CheckpointError(
                f"{part}: scales a tensor that is {data.dtype} and needs no scale; {AGAIN}"
            )


def _scaled(
    kind: str, packed: Shape, grid: Shape, shape: Shape, data: Stored, scales: Stored | None
) -> Layout:
    if data.shape != (shape if data.dtype == "F4" else packed):
        _refuse(data, data.dtype, shape if data.dtype == "F4" else packed)
    scales = _beside(data, scales, "scale", grid, _E8M0)
    return Layout(kind, np.uint8, packed, grid, data, scales)


def _packed(
    shape: Shape,
    data: Stored,
    scales: Stored | None,
    biases: Stored | None,
    quantization: Quantization,
) -> Layout:
    packing = quantization.of(data.name.removesuffix(".weight"))
    if packing is None:
        raise CheckpointError(
            f"{data}: is U32, but quantization in {quantization.path} does not say how it is "
            "packed; download both again"
        )
    mode, bits, group = packing.mode, packing.bits, packing.group
    rows, columns = shape
    if columns % group or data.shape != (rows, columns * bits // 32):
        _refuse(data, f"U32 ({packing})", (rows, columns * bits // 32))
    grid = rows, columns // group
    if mode == "affine":
        scales = _beside(data, scales, "scales", grid, ("BF16",))
        biases = _beside(data, biases, "biases", grid, ("BF16",))
        return Layout(mode, np.uint32, data.shape, grid, data, scales, biases, bits, group)
    _unwanted(data, biases)
    scales = _beside(data, scales, "scales", grid, ("U8", "F8_E8M0"))
    return Layout(mode, np.uint8, (rows, columns * bits // 8), grid, data, scales)


def _beside(
    data: Stored, part: Stored | None, what: str, grid: Shape, dtypes: tuple[str, ...]
) -> Stored:
    """The tensor beside `data`; refused if it is not of this shape and one of these dtypes."""
    if part is None:
        raise CheckpointError(
            f"{data}: is {data.dtype}, but its {what} {list(grid)} is missing; "
            "download the checkpoint again"
        )
    if part.dtype not in dtypes or part.shape != grid:
        _refuse(part, dtypes[0], grid)
    return part


def _refuse(stored: Stored, dtype: str, shape: Shape) -> NoReturn:
    raise CheckpointError(
        f"{stored}: is {stored.dtype} {list(stored.shape)}; config.json asks for "
        f"{dtype} {list(shape)}; download both again"
    )


def _not_finite(x: Array) -> Array:
    return x & 0x7F80 == 0x7F80


_BAD: dict[str, Callable[[Array], Array]] = {
    "fp8": lambda x: x & 0x7F == 0x7F,
    "mxfp8": lambda x: x & 0x7F == 0x7F,
    "bf16": _not_finite,
    "f16": lambda x: x.view(np.uint16) & 0x7C00 == 0x7C00,
    "f32": lambda x: x.view(np.uint32) & 0x7F800000 == 0x7F800000,
}


def check_values(layout: Layout, tensor: HostTensor) -> None:
    """Refuse NaN codes, NaN scales and non-finite values."""
    (data, values), *beside = layout.parts(tensor)
    for stored, scales in beside:
        if layout.format == "affine":
            _find(stored, scales, _not_finite, "NaN or infinite")
        else:
            _find(stored, scales, lambda x: x == E8M0_NAN, "NaN (scale byte 255)")
    if layout.format in _BAD:
        _find(data, values, _BAD[layout.format], "NaN or infinite")


def check_range(layout: Layout, data: Array, below: int) -> None:
    """Refuse integers outside [0, below)."""
    _find(layout.data, data, lambda x: (x < 0) | (x >= below), f"outside 0..{below - 1}")


def _find(stored: Stored, x: Array, bad: Callable[[Array], Array], problem: str) -> None:
    flat = x.reshape(-1)
    for start in range(0, flat.size, _CHUNK):
        mask = bad(flat[start : start + _CHUNK])
        if mask.any():
            position = np.unravel_index(start + int(mask.argmax()), x.shape)
            raise CheckpointError(
                f"{stored}: the value at {[int(i) for i in position]} is {problem}; {AGAIN}"
            )
