"""Results that the host will want, copied as soon as they are there."""

from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor


class Coming:
    """A small result on its way to the host: later work need not be waited for."""

    def __init__(self, x: Tensor) -> None:
        self._host = torch.empty(x.shape, dtype=x.dtype, pin_memory=True)
        self._host.copy_(x, non_blocking=True)
        self._there = torch.cuda.Event()
        self._there.record()

    def wait(self) -> NDArray[Any]:
        self._there.synchronize()
        return self._host.numpy()
