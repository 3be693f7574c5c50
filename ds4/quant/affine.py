"""Affine weights: value = scale * code + bias, one bf16 scale and bias a group of inputs.

MLX's mode "affine" (mlx.core.quantize). Scales may be negative: MLX puts the edge of larger
magnitude on code 0, so that zero, or nearly, is on the grid.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from .formats import decode_bf16, encode_bf16
from .packing import pack, unpack

Array = NDArray[Any]
Encoded = tuple[Array, Array, Array]  # words, and bf16 patterns of scales and of biases
f32 = np.float32

GROUPS = (32, 64, 128)
_TINY = f32(1e-7)  # MLX's least scale


def decode_affine(words: Array, scales: Array, biases: Array, bits: int, group: int) -> Array:
    """uint32 (..., K * bits / 32), uint16 bf16 (..., K / group) twice -> float32 (..., K).

    The product is exact in float32; only the sum rounds.
    """
    codes = unpack(words, bits)
    values = codes.reshape(*codes.shape[:-1], -1, group).astype(f32)
    values *= decode_bf16(scales)[..., None]
    values += decode_bf16(biases)[..., None]
    return values.reshape(codes.shape)


def encode_affine(w: Array, bits: int, group: int) -> Encoded:
    """float32 (..., K) to the nearest codes of each group's range, which is MLX's."""
    groups = np.asarray(w, f32).reshape(-1, group)
    scale, bias = full_range(groups, bits)
    return pack_groups(nearest_codes(groups, scale, bias, bits), scale, bias, w.shape, bits)


def full_range(groups: Array, bits: int) -> tuple[Array, Array]:
    """(n, group) -> the bf16 values, as float32 (n,), of MLX's scales and biases."""
    low, high = groups.min(-1), groups.max(-1)
    downward = np.abs(high) >= np.abs(low)
    scale = np.maximum((high - low) / f32(2**bits - 1), _TINY)
    scale = np.where(downward, -scale, scale)
    edge = np.where(downward, high, low)
    zero = np.rint(edge / scale)
    scale = np.where(zero == 0, scale, edge / np.where(zero == 0, 1, zero))
    return round_bf16(scale), round_bf16(np.where(zero == 0, 0, edge))


def nearest_codes(groups: Array, scale: Array, bias: Array, bits: int) -> Array:
    """(n, group), (n,), (n,) -> codes as float32 (n, group); a scale of 0 gives code 0."""
    inverse = np.divide(f32(1), scale, out=np.zeros_like(scale), where=scale != 0)
    codes = groups - bias[:, None]
    codes *= inverse[:, None]
    np.rint(codes, out=codes)
    return np.clip(codes, 0, 2**bits - 1, out=codes)


def pack_groups(
    codes: Array, scale: Array, bias: Array, shape: tuple[int, ...], bits: int
) -> Encoded:
    """Codes (n, group), scales and biases (n,) of a tensor of this shape, as they are stored."""
    grid = (*shape[:-1], -1)
    words = pack(codes.astype(np.uint8).reshape(shape), bits)
    return words, encode_bf16(scale).reshape(grid), encode_bf16(bias).reshape(grid)


def round_bf16(x: Array) -> Array:
    """float32 -> the nearest bf16 value, as float32."""
    return decode_bf16(encode_bf16(x))
