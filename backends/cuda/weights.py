"""Weights on a torch device, packed as in the file, made float32 where they are used."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ds4.quant import formats
from ds4.weights.tensor import HostTensor


@dataclass(frozen=True)
class Packed:
    """An FP8 or MXFP4 matrix, or a stack of them along the first axis."""

    format: str
    codes: Tensor  # uint8
    scales: Tensor  # uint8 E8M0

    def __getitem__(self, i: int) -> "Packed":
        return Packed(self.format, self.codes[i], self.scales[i])

    def __len__(self) -> int:
        return len(self.codes)


Weight = Tensor | Packed


def upload(tensor: HostTensor, device: str) -> Weight:
    """Vectors and F32 become float32; BF16 and F16 matrices stay; quantized ones stay packed."""
    data = torch.from_numpy(np.ascontiguousarray(tensor.data)).to(device)
    if tensor.scales is not None:
        return Packed(tensor.format, data, torch.from_numpy(tensor.scales).to(device))
    if tensor.format == "bf16":
        data = data.view(torch.bfloat16)
    return data.float() if data.ndim == 1 and data.is_floating_point() else data


def dense(w: Weight) -> Tensor:
    """The values as float32, exact."""
    if isinstance(w, Tensor):
        return w.float()
    if w.format == "mxfp4":
        return _mxfp4(w.codes, w.scales)
    return _fp8(w.codes, w.scales)


def _fp8(codes: Tensor, scales: Tensor) -> Tensor:
    rows, columns = codes.shape[-2:]
    block = formats.FP8_BLOCK
    scale = _e8m0(scales).repeat_interleave(block, -2)[..., :rows, :]
    scale = scale.repeat_interleave(block, -1)[..., :columns]
    return codes.view(torch.float8_e4m3fn).float() * scale


def _mxfp4(codes: Tensor, scales: Tensor) -> Tensor:
    table = torch.from_numpy(formats.E2M1).to(codes.device)
    pairs = torch.stack([codes & 15, codes >> 4], -1).int()
    groups = table[pairs].unflatten(-2, (-1, formats.FP4_GROUP // 2))
    return (groups * _e8m0(scales)[..., None, None]).flatten(-3)


def _e8m0(scales: Tensor) -> Tensor:
    """2^(b-127): the byte is the exponent field of a float32, but for 0, which is subnormal."""
    bits = scales.int() << 23
    return torch.where(bits == 0, 1 << 22, bits).view(torch.float32)
