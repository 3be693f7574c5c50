"""Fake quantization in PyTorch: a weight seen through its file format, gradients passed straight.

The same arithmetic as ds4.quant.formats, bit for bit (checked by `train_demo.py --smoke`).
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from ds4.weights.export import storage_format
from ds4.weights.names import stacked_experts, to_official

FP8_BLOCK, FP4_GROUP = 128, 32


def power_of_two_above(x: Tensor) -> Tensor:
    """The exponent e of the smallest 2^e >= x, int32; x > 0."""
    mantissa, exponent = torch.frexp(x)
    return exponent - (mantissa == 0.5).int()


def _two_to_the(exponent: Tensor) -> Tensor:
    """Exact 2^e for -126 <= e <= 127, from the bits of a float32."""
    return ((exponent + 127) << 23).view(torch.float32)


def round_mxfp4(w: Tensor) -> Tensor:
    """float32 (..., K), every 32 inputs rounded to e2m1 codes times a power of two."""
    groups = w.unflatten(-1, (-1, FP4_GROUP))
    largest = groups.abs().amax(-1, keepdim=True).clamp(min=6 * 2.0**-126)
    exponent = power_of_two_above(largest / 6).clamp(min=-126)
    x = (groups * _two_to_the(-exponent)).clamp(-6, 6)
    # the codes are 0.5 apart below 2, 1 apart below 4, 2 apart above
    step = 0.5 + 0.5 * (x.abs() >= 2) + 1.0 * (x.abs() >= 4)
    return ((x / step).round() * step * _two_to_the(exponent)).flatten(-2)


def round_fp8(w: Tensor) -> Tensor:
    """float32 (out, in), every 128 x 128 block rounded to e4m3 times a power of two."""
    rows, columns = w.shape
    padded = nn.functional.pad(w, (0, -columns % FP8_BLOCK, 0, -rows % FP8_BLOCK))
    blocks = padded.unflatten(1, (-1, FP8_BLOCK)).unflatten(0, (-1, FP8_BLOCK))
    largest = blocks.abs().amax((1, 3), keepdim=True).clamp(min=1e-4)
    exponent = power_of_two_above(largest / 448)
    x = (blocks * _two_to_the(-exponent)).clamp(-448, 448)
    rounded = x.to(torch.float8_e4m3fn).float() * _two_to_the(exponent)
    return rounded.flatten(2).flatten(0, 1)[:rows, :columns]


def round_bf16(w: Tensor) -> Tensor:
    return w.to(torch.bfloat16).float()


ROUNDERS: dict[str, Callable[[Tensor], Tensor]] = {
    "mxfp4": round_mxfp4,
    "fp8": round_fp8,
    "bf16": round_bf16,
}


class _StraightThrough(torch.autograd.Function):
    """Rounding whose gradient is that of doing nothing."""

    @staticmethod
    def forward(_: Any, w: Tensor, rounding: Callable[[Tensor], Tensor]) -> Tensor:
        return rounding(w)

    @staticmethod
    def backward(_: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None


class Switch:
    """Whether weights are seen through their formats."""

    def __init__(self) -> None:
        self.on = False


class Rounded(nn.Module):
    """A parametrization: the weight as the exported file will hold it, when the switch is on."""

    def __init__(self, kind: str, switch: Switch) -> None:
        super().__init__()
        self.round, self.switch = ROUNDERS[kind], switch

    def forward(self, w: Tensor) -> Tensor:
        return _StraightThrough.apply(w, self.round) if self.switch.on else w

    def right_inverse(self, w: Tensor) -> Tensor:
        return w


def format_of(name: str) -> str:
    """The format in which a parameter of transformers' model is exported."""
    if stacked_experts(name):
        return "mxfp4"
    return storage_format(to_official(name))


def attach(model: nn.Module, switch: Switch) -> None:
    """Show every parameter that is not stored as F32 through its format."""
    for name, _ in list(model.named_parameters()):
        kind = format_of(name)
        if kind in ROUNDERS:
            module, _, leaf = name.rpartition(".")
            owner = model.get_submodule(module)
            parametrize.register_parametrization(owner, leaf, Rounded(kind, switch))


def exported_names(model: nn.Module) -> Iterator[str]:
    """The names of parameters and buffers as transformers saves them."""
    for name in model.state_dict():
        yield name.replace(".parametrizations", "").removesuffix(".original")


@torch.no_grad()
def weights(model: nn.Module, switch: Switch) -> dict[str, Tensor]:
    """Every weight on the CPU, float32 or int64, as seen through its format."""
    before, switch.on = switch.on, True
    try:
        found: dict[str, Tensor] = {}
        for name in exported_names(model):
            module, _, leaf = name.rpartition(".")
            found[name] = getattr(model.get_submodule(module), leaf).detach().cpu()
        return found
    finally:
        switch.on = before
