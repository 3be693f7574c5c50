"""The PyTorch backend: NVIDIA GPUs, or the CPU with device="cpu"."""

from .ops import Cuda

__all__ = ["Cuda"]
