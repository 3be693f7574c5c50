"""How one weight is stored: its number format, and which values are refused.

Formats: specification 2.3. A matrix may be FP8 or packed FP4 with a scale tensor beside it, or
plain BF16, F16 or F32; everything else is plain, and routing tables are integers.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NoReturn

import numpy as np

from ..errors import CheckpointError
from ..quant.formats import E8M0_NAN, FP4_GROUP, FP8_BLOCK
from .names import Shape, is_matrix
from .shards import AGAIN, Stored
from .tensor import Array

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

    @property
    def nbytes(self) -> int:
        return self.data.nbytes + (self.scales.nbytes if self.scales else 0)


def find_layout(name: str, shape: Shape, data: Stored, scales: Stored | None) -> Layout:
    """The Layout of an official tensor of this logical shape; refused if it does not fit."""
    if name.endswith("tid2eid"):
        if data.dtype not in _INTEGERS:
            _refuse(data, "I64 or I32", shape)
        return _plain("int", _INTEGERS[data.dtype], shape, data, scales)
    if data.dtype in _FLOATS:
        return _plain(*_FLOATS[data.dtype], shape, data, scales)
    if is_matrix(name, shape) and data.dtype == "F8_E4M3":
        blocks = tuple(-(-n // FP8_BLOCK) for n in shape)
        return _scaled("fp8", shape, blocks, shape, data, scales)
    if is_matrix(name, shape) and data.dtype in _PACKED_FP4:
        rows, columns = shape
        packed, groups = (rows, columns // 2), (rows, columns // FP4_GROUP)
        if columns % FP4_GROUP:
            _refuse(data, "F8_E4M3, BF16, F16 or F32 (FP4 takes multiples of 32)", shape)
        return _scaled("mxfp4", packed, groups, shape, data, scales)
    _refuse(data, _wanted(name, shape), shape)


def _wanted(name: str, shape: Shape) -> str:
    quantised = "F8_E4M3, I8 (packed FP4), " if is_matrix(name, shape) else ""
    return f"{quantised}BF16, F16 or F32"


def _plain(kind: str, dtype: Any, shape: Shape, data: Stored, scales: Stored | None) -> Layout:
    if data.shape != shape:
        _refuse(data, data.dtype, shape)
    if scales is not None:
        raise CheckpointError(
            f"{scales}: scales a tensor that is {data.dtype} and needs no scale; {AGAIN}"
        )
    return Layout(kind, dtype, shape, None, data, None)


def _scaled(
    kind: str, packed: Shape, grid: Shape, shape: Shape, data: Stored, scales: Stored | None
) -> Layout:
    if data.shape != (shape if data.dtype == "F4" else packed):
        _refuse(data, data.dtype, shape if data.dtype == "F4" else packed)
    if scales is None:
        raise CheckpointError(
            f"{data}: is {data.dtype}, but its scale {list(grid)} is missing; "
            "download the checkpoint again"
        )
    if scales.dtype not in _E8M0 or scales.shape != grid:
        _refuse(scales, "F8_E8M0", grid)
    return Layout(kind, np.uint8, packed, grid, data, scales)


def _refuse(stored: Stored, dtype: str, shape: Shape) -> NoReturn:
    raise CheckpointError(
        f"{stored}: is {stored.dtype} {list(stored.shape)}; config.json asks for "
        f"{dtype} {list(shape)}; download both again"
    )


def check_values(layout: Layout, data: Array, scales: Array | None) -> None:
    """Refuse NaN codes, NaN scales and non-finite values."""
    if scales is not None and layout.scales is not None:
        _find(layout.scales, scales, lambda x: x == E8M0_NAN, "NaN (scale byte 255)")
    bad: dict[str, Callable[[Array], Array]] = {
        "fp8": lambda x: x & 0x7F == 0x7F,
        "bf16": lambda x: x & 0x7F80 == 0x7F80,
        "f16": lambda x: x.view(np.uint16) & 0x7C00 == 0x7C00,
        "f32": lambda x: x.view(np.uint32) & 0x7F800000 == 0x7F800000,
    }
    if layout.format in bad:
        _find(layout.data, data, bad[layout.format], "NaN or infinite")


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
