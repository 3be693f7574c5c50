"""The MLX backend: Apple Silicon, or a Linux CPU with mlx[cpu]."""

from .ops import Mlx

__all__ = ["Mlx"]
