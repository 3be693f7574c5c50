"""PyTorch backends: "cuda" for NVIDIA GPUs, and "torch", its plain operations on any device."""

from typing import Any

from ds4.backend import CacheMode
from ds4.errors import BackendError

from .ops import Cuda as _Operations


class Plain(_Operations):
    """PyTorch's operations, one after another."""

    name = "torch"


def Cuda(device: str = "auto", cache: CacheMode = "native") -> Any:  # noqa: N802
    """The backend for a device: kernels on a GPU that can run them, else PyTorch operations.

    Raises BackendError if no device is named and there is no GPU.
    """
    import torch

    plain = _Operations(device, cache)
    on_gpu = plain.device.startswith("cuda")
    if device == "auto" and not on_gpu:
        raise BackendError(
            f"torch {torch.__version__} sees no NVIDIA GPU here: leave --backend out, or say "
            "--device cpu for PyTorch's operations"
        )
    if not on_gpu or torch.cuda.get_device_capability(plain.device) < (8, 0):
        return plain
    from .fast import Fast

    return Fast(plain.device, cache)


__all__ = ["Cuda", "Plain"]
