"""Where the quantizers compute: one algorithm over NumPy on the CPU, or over PyTorch on a GPU.

`xp` is numpy or torch; what these two name alike is called on it, the rest is here. NumPy is used
on every CPU, so that the bytes there do not depend on what is installed.
"""

import importlib.util
import os
from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ..errors import QuantizeError
from . import formats

if TYPE_CHECKING:
    from ..weights.tensor import HostTensor

Array = Any  # numpy.ndarray or torch.Tensor
Host = NDArray[Any]


class Arrays:
    """NumPy."""

    xp: ModuleType = np
    name = "cpu"  # what a manifest says
    chunk = 1 << 18  # values at a time: smaller ones wait for Python, larger ones for memory
    piece = 1 << 22  # bytes of a matrix converted by one thread
    batch = 1  # matrices worth giving to GPTQ at once
    workers = min(os.cpu_count() or 1, 16)  # threads that convert at once

    def put(self, x: Host) -> Array:
        """The same array, here."""
        return x

    def get(self, x: Array) -> Host:
        """Back in NumPy."""
        return np.asarray(x)

    def decode(self, tensor: "HostTensor") -> Array:
        """A weight's values, float32."""
        return tensor.decode()

    def bytes(self, x: Array) -> Array:
        return x.astype(np.uint8)

    def short(self, x: Array) -> Array:
        """Integers that hold 0 to 32767."""
        return x.astype(np.int16)

    def single(self, x: Array) -> Array:
        return x.astype(np.float32)

    def double(self, x: Array) -> Array:
        return x.astype(np.float64)

    def round(self, x: Array) -> Array:
        """To the nearest integer, ties to even; changes x."""
        return np.rint(x, out=x)

    def round_bf16(self, x: Array) -> Array:
        """float32 to the nearest values of bf16."""
        return formats.decode_bf16(formats.encode_bf16(x))

    def scaled(self, x: Array, scale: Array, offset: Array) -> Array:
        """x * scale + offset."""
        x = x * scale
        x += offset
        return x

    def dot(self, a: Array, b: Array) -> Array:
        """Sums over the last axis of a * b."""
        return np.einsum("...i,...i->...", a, b)

    def identity(self, n: int) -> Array:
        """float64 (n, n)."""
        return np.eye(n)

    def pick(self, x: Array, index: Array) -> Array:
        """(n, ...), (...) -> (...): the item of each index along the first axis."""
        return np.take_along_axis(x, index[None], 0)[0]


class TorchArrays(Arrays):
    """PyTorch on a GPU."""

    chunk = 1 << 25
    piece = 1 << 25
    workers = 2  # one reads while the other computes

    def __init__(self, device: str) -> None:
        import torch

        self.torch: Any = torch
        self.xp = torch
        self.device = device
        self.name, self.batch = f"{device}, torch {torch.__version__}", 4
        if device.startswith("cuda"):
            about = torch.cuda.get_device_properties(device)
            self.name = f"{about.name}, torch {torch.__version__}"
            self.batch = min(64, max(about.total_memory >> 30, 1))
        byte = np.arange(256)
        pairs = np.stack([formats.E2M1[byte & 15], formats.E2M1[byte >> 4]], -1)
        self._pairs = self.put(pairs)
        self._scales = self.put(formats.E8M0)

    def put(self, x: Host) -> Array:
        return self.torch.from_numpy(np.ascontiguousarray(x)).to(self.device)

    def get(self, x: Array) -> Host:
        return np.asarray(x.cpu().numpy())

    def decode(self, tensor: "HostTensor") -> Array:
        if tensor.format != "mxfp4" or tensor.scales is None:
            return self.put(tensor.decode())
        values = self._pairs[self.put(tensor.data).int()]
        scales = self._scales[self.put(tensor.scales).int()]
        groups = values.reshape(*scales.shape, formats.FP4_GROUP)
        return (groups * scales[..., None]).reshape(tensor.shape)

    def bytes(self, x: Array) -> Array:
        return x.to(self.torch.uint8)

    def short(self, x: Array) -> Array:
        return x.to(self.torch.int16)

    def single(self, x: Array) -> Array:
        return x.to(self.torch.float32)

    def double(self, x: Array) -> Array:
        return x.to(self.torch.float64)

    def round(self, x: Array) -> Array:
        return x.round_()

    def round_bf16(self, x: Array) -> Array:
        return x.to(self.torch.bfloat16).to(self.torch.float32)

    def scaled(self, x: Array, scale: Array, offset: Array) -> Array:
        return self.torch.addcmul(offset, x, scale)

    def dot(self, a: Array, b: Array) -> Array:
        return (a * b).sum(-1)

    def identity(self, n: int) -> Array:
        return self.torch.eye(n, dtype=self.torch.float64, device=self.device)

    def pick(self, x: Array, index: Array) -> Array:
        return self.torch.gather(x, 0, index[None])[0]


CPU = Arrays()


def open_arrays(device: str = "auto") -> Arrays:
    """For "cpu", "cuda", or "auto": a GPU if PyTorch sees one. Raises QuantizeError."""
    if device == "cpu":
        return CPU
    if device not in ("auto", "cuda"):
        raise QuantizeError(f"device must be auto, cpu or cuda, not {device!r}")
    installed = importlib.util.find_spec("torch") is not None
    if installed:
        import torch

        if torch.cuda.is_available():
            return TorchArrays("cuda")
    if device == "auto":
        return CPU
    problem = (
        "torch sees no GPU" if installed else "torch is not installed: pip install 'ds4[cuda]'"
    )
    raise QuantizeError(f"device cuda: {problem}; or give --device cpu")
