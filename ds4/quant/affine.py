"""Affine weights: value = scale * code + bias, one bf16 scale and bias a group of inputs.

MLX's mode "affine" (mlx.core.quantize). Scales may be negative: MLX puts the edge of larger
magnitude on code 0, so that zero, or nearly, is on the grid.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from .arrays import CPU, Arrays
from .formats import decode_bf16, encode_bf16
from .packing import as_words, stream_bytes, unpack

Array = NDArray[Any]
Encoded = tuple[Array, Array, Array]  # words, and bf16 patterns of scales and of biases
f32 = np.float32

GROUPS = (32, 64, 128)
_TINY = 1e-7  # MLX's least scale


def decode_affine(words: Array, scales: Array, biases: Array, bits: int, group: int) -> Array:
    """uint32 (..., K * bits / 32), uint16 bf16 (..., K / group) twice -> float32 (..., K).

    The product is exact in float32; only the sum rounds.
    """
    codes = unpack(words, bits)
    values = codes.reshape(*codes.shape[:-1], -1, group).astype(f32)
    values *= decode_bf16(scales)[..., None]
    values += decode_bf16(biases)[..., None]
    return values.reshape(codes.shape)


def encode_affine(w: Any, bits: int, group: int, on: Arrays = CPU) -> Encoded:
    """float32 (..., K) to the nearest codes of each group's range, which is MLX's."""
    groups = w.reshape(-1, group)
    scale, bias = full_range(groups, bits, on)
    codes = on.short(nearest_codes(groups, scale, bias, bits, on))
    return pack_groups(codes.reshape(w.shape), scale, bias, bits, on)


def full_range(groups: Any, bits: int, on: Arrays) -> tuple[Any, Any]:
    """(..., group) -> the bf16 values, as float32 (...), of MLX's scales and biases."""
    xp = on.xp
    low, high = xp.amin(groups, -1), xp.amax(groups, -1)
    downward = abs(high) >= abs(low)
    scale = xp.clip((high - low) / (2**bits - 1), _TINY, None)
    scale = xp.where(downward, -scale, scale)
    edge = xp.where(downward, high, low)
    zero = on.round(edge / scale)
    scale = xp.where(zero == 0, scale, edge / xp.where(zero == 0, 1, zero))
    return on.round_bf16(scale), on.round_bf16(xp.where(zero == 0, 0, edge))


def nearest_codes(groups: Any, scale: Any, bias: Any, bits: int, on: Arrays) -> Any:
    """(..., group), (...), (...) -> codes as float32 (..., group); a scale of 0 gives code 0."""
    xp = on.xp
    inverse = xp.where(scale != 0, 1 / xp.where(scale != 0, scale, 1), 0)
    codes = on.scaled(groups, inverse[..., None], -(bias * inverse)[..., None])
    return xp.clip(on.round(codes), 0, 2**bits - 1, out=codes)


def pack_groups(codes: Any, scale: Any, bias: Any, bits: int, on: Arrays) -> Encoded:
    """Codes (..., K) as short integers, with a scale and a bias a group, as they are stored."""
    stream = on.get(on.bytes(stream_bytes(codes, bits, on.xp)))
    grid = (*codes.shape[:-1], -1)
    scales, biases = (encode_bf16(on.get(x)).reshape(grid) for x in (scale, bias))
    return as_words(stream), scales, biases
