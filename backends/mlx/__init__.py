"""The MLX backend: Apple Silicon, or a Linux CPU with mlx[cpu]."""

import os

# By default MLX multiplies float32 matrices with 11 bits on an M5. It reads this when first used.
os.environ.setdefault("MLX_ENABLE_TF32", "0")

from .ops import Mlx

__all__ = ["Mlx"]
