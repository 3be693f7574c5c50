"""A quantized matrix, or a stack of them, as the kernels read it: one run of bytes a matrix.

    codes    row-major, packed as in the file (ds4/quant/packing.py); F16: the values
    scales   mxfp4, mxfp8: uint8 E8M0 (rows, cols / 32); affine: bfloat16 (rows, cols / group)
    biases   of affine: bfloat16 (rows, cols / group)
    base     int32 b

Kernels work on fp16 values w * 2^-b, which are exact but for affine's (rounded to 11 bits), and
multiply sums by 2^b. b is the exponent of the matrix's largest scale, so what is lost at the small
end is less than 2^-24 of the largest value.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ds4.quant import formats
from ds4.quant.mxfp8 import spread_scales
from ds4.weights.synthetic_tensor import SyntheticTensor, grid
from ds4.weights.tensor import HostTensor

from .synthetic import device_parts, device_values

ALIGN = 16


@dataclass(frozen=True)
class QMatrix:
    """`stack` matrices of `rows` x `cols`; matrix i lies at address `ptrs[i]`."""

    format: str  # f16, mxfp8, mxfp4 or affine
    bits: int
    group: int  # inputs that share a scale; 0 for f16
    rows: int
    cols: int
    blob: Tensor  # uint8 (stack, bytes)
    ptrs: Tensor  # int64 (stack,), on the device
    address: int  # of the first matrix, for the host
    scales_at: int
    biases_at: int
    base_at: int
    exponent: int | None = None  # b, of a single matrix
    tier: Any = None  # of experts that are in two memories: their placement.layer.Layer

    @property
    def stack(self) -> int:
        return len(self.ptrs)

    @cached_property
    def plain(self) -> Tensor:
        """fp16 (rows, cols): the values of a single F16 matrix, where they lie."""
        return self.blob[0, : self.rows * self.cols * 2].view(torch.float16).view(self.rows, -1)

    @property
    def nbytes(self) -> int:
        return self.blob.numel()


def load_matrix(tensor: HostTensor, device: str, stacked: bool = False) -> QMatrix:
    """A matrix, or with `stacked` one for each of its first axis; else that axis joins the rows."""
    if len(tensor.shape) == 3 and not stacked:
        if isinstance(tensor, SyntheticTensor):
            tensor = tensor.of_shape(tensor.shape[0] * tensor.shape[1], tensor.shape[2])
        else:
            tensor = tensor.map(lambda x: x.reshape(-1, x.shape[-1]))
    return from_host(tensor, device)


def from_host(tensor: HostTensor, device: str) -> QMatrix:
    """(rows, cols), or (stack, rows, cols), of any format."""
    if isinstance(tensor, SyntheticTensor):
        return _synthetic(tensor, device)
    if tensor.format in ("bf16", "f16", "f32"):
        values = torch.from_numpy(np.ascontiguousarray(tensor.data))
        if tensor.format == "bf16":
            values = values.view(torch.bfloat16)
        return from_values(values.to(device))
    assert tensor.scales is not None
    codes, scales, biases = tensor.data, tensor.scales, tensor.biases
    fmt, bits, group = tensor.format, tensor.bits, tensor.group
    if fmt == "fp8":
        fmt, scales = "mxfp8", spread_scales(scales, *codes.shape[-2:])
    if fmt != "affine":
        bits, group = (4 if fmt == "mxfp4" else 8), formats.FP4_GROUP
    parts = [None if x is None else _bytes(x, device) for x in (codes, scales, biases)]
    return assemble(fmt, bits, group, tensor.shape[-2:], *parts)  # type: ignore[arg-type]


def _synthetic(tensor: SyntheticTensor, device: str) -> QMatrix:
    """What `from_host` would make of its arrays, made on the device."""
    if tensor.format in ("bf16", "f32"):
        return from_values(device_values(tensor, device))
    codes, scales, biases = device_parts(tensor, device)
    assert scales is not None
    fmt, bits, group = tensor.format, tensor.bits, tensor.group
    if fmt == "fp8":
        blocks = scales.cpu().numpy().reshape(grid(tensor.spec))
        fmt, scales = "mxfp8", _bytes(spread_scales(blocks, *tensor.shape[-2:]), device)
    if fmt != "affine":
        bits, group = (4 if fmt == "mxfp4" else 8), formats.FP4_GROUP
    return assemble(fmt, bits, group, tensor.shape[-2:], codes, scales, biases)


def from_values(values: Tensor) -> QMatrix:
    """Plain values, kept as fp16 relative to a power of two: of bfloat16 nothing is lost."""
    stacked = values.float() if values.ndim == 3 else values.float()[None]
    largest = stacked.abs().amax((1, 2)).clamp_min(2.0**-100)
    base = torch.frexp(largest).exponent - 15  # the largest value in [2^14, 2^15)
    halves = torch.ldexp(stacked, -base[:, None, None]).half().contiguous()
    codes = halves.view(len(halves), -1).view(torch.uint8)
    return _joined("f16", 16, 0, values.shape[-2:], [codes], base.int())


def assemble(
    fmt: str,
    bits: int,
    group: int,
    shape: tuple[int, ...] | torch.Size,
    codes: Tensor,
    scales: Tensor,
    biases: Tensor | None = None,
) -> QMatrix:
    """From the parts' bytes on the device, uint8 of any shape with the stack in front."""
    rows, cols = shape
    stack = codes.numel() // (rows * cols * bits // 8)
    parts = [x.reshape(stack, -1) for x in (codes, scales, biases) if x is not None]
    if fmt == "affine":
        s, z = (x.view(torch.bfloat16).abs().amax(1).float() for x in parts[1:])
        largest = torch.maximum(s * (2**bits - 1), z).clamp_min(2.0**-100)
        base = torch.frexp(largest).exponent
    else:
        base = parts[1].amax(1).int() - 127
    return _joined(fmt, bits, group, (rows, cols), parts, base.int())


def _joined(
    fmt: str, bits: int, group: int, shape: tuple[int, ...], parts: list[Tensor], base: Tensor
) -> QMatrix:
    rows, cols = shape
    ends, at = [], 0
    for part in parts:
        ends.append(at)
        at = -(-(at + part.shape[1]) // ALIGN) * ALIGN
    blob = torch.zeros(len(base), at + ALIGN, dtype=torch.uint8, device=base.device)
    for start, part in zip(ends, parts, strict=True):
        blob[:, start : start + part.shape[1]] = part
    blob[:, at : at + 4] = base[:, None].contiguous().view(torch.uint8)
    address = blob.data_ptr()
    ptrs = torch.arange(len(blob), device=blob.device) * blob.shape[1] + address
    scales_at, biases_at = [*ends, 0, 0][1:3]
    exponent = int(base[0]) if len(base) == 1 else None
    places = scales_at, biases_at, at
    return QMatrix(fmt, bits, group, rows, cols, blob, ptrs, address, *places, exponent)


def one_of(m: QMatrix, index: int) -> QMatrix:
    """One matrix of a stack, which shares its bytes."""
    some = slice(index, index + 1)
    address = m.address + index * m.blob.shape[1]
    return replace(m, blob=m.blob[some], ptrs=m.ptrs[some], address=address)


def renumbered(m: QMatrix, ids: Sequence[int], count: int) -> QMatrix:
    """A stack of `count` matrices of which m's are number ids[i]; the others must not be read."""
    ptrs = m.ptrs[:1].repeat(count)
    ptrs[torch.tensor(list(ids), device=ptrs.device)] = m.ptrs
    return replace(m, ptrs=ptrs)


def dequantize(m: QMatrix) -> Tensor:
    """float32 (stack, rows, cols): slow and plain, for tests."""
    n = m.rows * m.cols * m.bits // 8
    codes = m.blob[:, :n]
    base = m.blob[:, m.base_at : m.base_at + 4].contiguous().view(torch.int32)
    if m.format == "f16":
        values = codes.contiguous().view(torch.float16).float()
        return torch.ldexp(values, base).view(m.stack, m.rows, m.cols)
    data = codes.contiguous().cpu().numpy().reshape(m.stack, m.rows, -1)
    width = m.rows * m.cols // m.group
    scales, biases = (
        m.blob[:, at : at + width * (2 if m.format == "affine" else 1)].contiguous().cpu().numpy()
        for at in (m.scales_at, m.biases_at)
    )
    grid = (m.stack, m.rows, -1)
    if m.format == "affine":
        tensor = HostTensor(
            "affine",
            data.view(np.uint32),
            scales.view(np.uint16).reshape(grid),
            biases.view(np.uint16).reshape(grid),
            m.bits,
            m.group,
        )
    else:
        tensor = HostTensor(m.format, data, scales.reshape(grid))
    return torch.from_numpy(tensor.decode()).to(m.blob.device)


def _bytes(x: np.ndarray, device: str) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(x).view(np.uint8)).to(device)
