"""Random weights made where they are used: 25 GB of them take seconds."""

import torch
from torch import Tensor

from ds4.weights.synthetic_tensor import SyntheticTensor, parts


class _Torch:
    """A torch device as a synthetic_tensor.Maker."""

    def __init__(self, device: str) -> None:
        self.device = device

    def empty(self, nbytes: int) -> Tensor:
        return torch.empty(nbytes, dtype=torch.uint8, device=self.device)

    def count(self, first: int, stop: int) -> Tensor:
        return torch.arange(first, stop, dtype=torch.int32, device=self.device)

    def as_bytes(self, x: Tensor) -> Tensor:
        return x.view(torch.uint8)

    def as_floats(self, x: Tensor) -> Tensor:
        return x.view(torch.float32)

    def to_floats(self, x: Tensor) -> Tensor:
        return x.float()

    def to_bf16(self, x: Tensor) -> Tensor:
        return x.bfloat16()


def device_parts(
    tensor: SyntheticTensor, device: str
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Data, scales and biases as flat uint8 tensors on the device; None for what is not there."""
    made: tuple[Tensor, Tensor | None, Tensor | None] = parts(tensor, _Torch(device))
    return made


def device_values(tensor: SyntheticTensor, device: str) -> Tensor:
    """A tensor of format f32 or bf16, on the device."""
    kind = {"f32": torch.float32, "bf16": torch.bfloat16}[tensor.format]
    return device_parts(tensor, device)[0].view(kind).view(tensor.shape)
