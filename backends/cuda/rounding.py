"""Cache rows rounded to their FP8 and FP4 grids, as ds4/quant/formats.py specifies."""

import torch
from torch import Tensor

from ds4.quant import formats


def round_kv(x: Tensor, rotary: int) -> Tensor:
    """FP8 in groups of 64 for all but the last `rotary` channels, bf16 for those."""
    plain, tail = x.split([x.shape[-1] - rotary, rotary], -1)
    groups = plain.unflatten(-1, (-1, 64))
    exponent = _exponent(groups, 1e-4, 448)
    codes = torch.ldexp(groups, -exponent).clamp(-448, 448).to(torch.float8_e4m3fn)
    rounded = torch.ldexp(codes.float(), exponent).flatten(-2)
    return torch.cat([rounded, tail.bfloat16().float()], -1)


def round_index(x: Tensor, hadamard: Tensor) -> Tensor:
    """Hadamard, then FP4 in groups of 32."""
    groups = (x @ hadamard).unflatten(-1, (-1, formats.FP4_GROUP))
    exponent = _exponent(groups, 6 * 2.0**-126, 6)
    return torch.ldexp(_e2m1(torch.ldexp(groups, -exponent)), exponent).flatten(-2)


def _exponent(groups: Tensor, floor: float, largest: float) -> Tensor:
    """Of the smallest power of two that brings a group within `largest`."""
    ratio = groups.abs().amax(-1, keepdim=True).clamp_min(floor) / largest
    mantissa, exponent = torch.frexp(ratio)
    return (exponent - (mantissa == 0.5).int()).clamp_min(-126)


def _e2m1(x: Tensor) -> Tensor:
    """Nearest of 0, .5, 1, 1.5, 2, 3, 4, 6, ties to the even code: steps of 1/2, then 1, then 2."""
    size = x.abs().clamp_max(6)
    step = torch.where(size < 2, 0.5, torch.where(size < 4, 1.0, 2.0))
    return (torch.round(size / step) * step).copysign(x)
