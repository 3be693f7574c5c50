"""Weights on a torch device, packed as in the file, made float32 where they are used."""

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ds4.quant import formats
from ds4.weights.synthetic_tensor import SyntheticTensor, grid
from ds4.weights.tensor import HostTensor

from .synthetic import device_parts, device_values


@dataclass(frozen=True)
class Packed:
    """A quantized matrix, or a stack of them along the first axis."""

    format: str
    codes: Tensor  # uint8, as in the file; affine's words as bytes
    scales: Tensor  # uint8 E8M0 for mxfp4 and mxfp8; float32 for FP8, which has few; bfloat16
    biases: Tensor | None = None  # bfloat16, of affine only
    bits: int = 0  # of affine

    def __getitem__(self, i: Tensor | list[int]) -> "Packed":
        biases = None if self.biases is None else self.biases[i]
        return Packed(self.format, self.codes[i], self.scales[i], biases, self.bits)


@dataclass(frozen=True)
class Part:
    """Some matrices of a stack, called by their numbers in it."""

    weight: Tensor | Packed
    ids: tuple[int, ...]

    def __getitem__(self, ids: list[int]) -> Tensor | Packed:
        return self.weight[[self.ids.index(i) for i in ids]]


Weight = Tensor | Packed


def upload(tensor: HostTensor, device: str) -> Weight:
    """Packed on a GPU; float32 on the CPU, where decoding takes longer than reading."""
    if device == "cpu" and tensor.format != "int":
        tensor = HostTensor("f32", tensor.decode())
    return pack(tensor, device)


def pack(tensor: HostTensor, device: str) -> Weight:
    """Vectors become float32; BF16 and F16 matrices stay; quantized ones stay packed."""
    if isinstance(tensor, SyntheticTensor):
        return _made(tensor, device)
    if tensor.format == "fp8" and any(n % formats.FP8_BLOCK for n in tensor.shape[-2:]):
        tensor = HostTensor("bf16", formats.encode_bf16(tensor.decode()))  # exact
    host = np.ascontiguousarray(tensor.data)
    if tensor.scales is not None:
        return _packed(tensor, torch.from_numpy(host.view(np.uint8)).to(device))
    data = torch.from_numpy(host).to(device)
    if tensor.format == "bf16":
        data = data.view(torch.bfloat16)
    return data.float() if data.ndim == 1 and data.is_floating_point() else data


def _made(tensor: SyntheticTensor, device: str) -> Weight:
    """What `pack` would make of a synthetic tensor's arrays, but on the device."""
    if tensor.format in ("f32", "bf16"):
        values = device_values(tensor, device)
        return values.float() if values.ndim == 1 else values
    codes, scales, biases = device_parts(tensor, device)
    assert scales is not None
    codes = codes.view(*tensor.shape[:-1], -1)
    if tensor.format == "fp8":
        table = torch.from_numpy(formats.E8M0).to(device)
        return Packed("fp8", codes, table[scales.long()].view(grid(tensor.spec)))
    if biases is None:
        return Packed(tensor.format, codes, scales.view(grid(tensor.spec)))
    s, z = (x.view(torch.bfloat16).view(grid(tensor.spec)) for x in (scales, biases))
    return Packed("affine", codes, s, z, tensor.bits)


def _packed(tensor: HostTensor, codes: Tensor) -> Packed:
    assert tensor.scales is not None
    host = formats.E8M0[tensor.scales] if tensor.format == "fp8" else tensor.scales
    scales = torch.from_numpy(np.ascontiguousarray(host)).to(codes.device)
    if tensor.biases is None:
        return Packed(tensor.format, codes, scales)
    biases = torch.from_numpy(np.ascontiguousarray(tensor.biases)).to(codes.device)
    bf16 = torch.bfloat16
    return Packed("affine", codes, scales.view(bf16), biases.view(bf16), tensor.bits)


def in_host_memory(w: Tensor) -> Tensor:
    """The same where a GPU's kernels can read it as well: for what a token takes one row of."""
    return torch.empty(w.shape, dtype=w.dtype, pin_memory=w.is_cuda).copy_(w)


def dense(w: Weight) -> Tensor:
    """The values as float32, exact."""
    if isinstance(w, Tensor):
        return w.float()
    if w.format == "affine":
        return _affine(w)
    e4m3, e2m1_pairs = _tables(w.codes.device)
    if w.format == "fp8":
        *stack, tall, wide = w.scales.shape
        blocks = e4m3.take(w.codes.long()).view(
            *stack, tall, formats.FP8_BLOCK, wide, formats.FP8_BLOCK
        )
        return blocks.mul_(w.scales[..., :, None, :, None]).view(w.codes.shape)
    if w.format == "mxfp4":
        values = e2m1_pairs.take(w.codes.long()).view(torch.float32)
    else:
        values = e4m3.take(w.codes.long())
    # A scale byte is the exponent field of a float32, but for 0, which means 2^-127.
    scales = (w.scales.int() << 23).clamp_min_(1 << 22).view(torch.float32)
    return values.view(*scales.shape, formats.FP4_GROUP).mul_(scales[..., None]).flatten(-2)


def dense_each(w: Weight | Part, ids: list[int]) -> Sequence[Tensor]:
    """Some matrices of a stack as float32."""
    return [w[i].float() for i in ids] if isinstance(w, Tensor) else list(dense(w[ids]))


def _affine(w: Packed) -> Tensor:
    """8 codes lie in `bits` bytes (ds4/quant/packing.py); the product is exact, the sum rounds."""
    assert w.biases is not None
    stream = w.codes.unflatten(-1, (-1, w.bits)).int()
    start = torch.arange(0, 8 * w.bits, w.bits, device=stream.device)
    low, high = start // 8, (start // 8 + 1).clamp_max(w.bits - 1)
    codes = (stream[..., low] | stream[..., high] << 8) >> start % 8 & (1 << w.bits) - 1
    values = codes.float().view(*w.scales.shape, -1)
    return (values.mul_(w.scales.float()[..., None]) + w.biases.float()[..., None]).flatten(-2)


@functools.cache
def _tables(device: torch.device) -> tuple[Tensor, Tensor]:
    """The value of each FP8 byte, and the two values of each FP4 byte as one int64."""
    byte = np.arange(256)
    pairs = np.stack([formats.E2M1[byte & 15], formats.E2M1[byte >> 4]], -1).view(np.int64)
    return torch.from_numpy(formats.E4M3).to(device), torch.from_numpy(pairs[:, 0]).to(device)
