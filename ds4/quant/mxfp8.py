"""MXFP8, MLX's mode "mxfp8": e4m3 codes, one E8M0 scale per 32 inputs of a row.

DeepSeek's FP8, one scale per 128 x 128 block, is the same with the scale repeated.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from .formats import E4M3, E8M0, FP8_BLOCK, encode_e4m3, power_of_two_above

Array = NDArray[Any]
f32 = np.float32

GROUP = 32
_FLOOR = f32(448 * 2.0**-126)  # scale byte 0 is a subnormal, which a GPU may flush


def decode_mxfp8(codes: Array, scales: Array) -> Array:
    """uint8 (..., K), uint8 (..., K / 32) -> float32 (..., K)."""
    values = E4M3[codes].reshape(*codes.shape[:-1], -1, GROUP)
    return (values * E8M0[scales][..., None]).reshape(codes.shape)


def encode_mxfp8(w: Array) -> tuple[Array, Array]:
    """float32 (..., K) -> codes uint8 (..., K), scales uint8 (..., K / 32)."""
    groups = np.asarray(w, f32).reshape(*w.shape[:-1], -1, GROUP)
    exponent = power_of_two_above(np.maximum(np.abs(groups).max(-1), _FLOOR) / f32(448))
    codes = encode_e4m3(np.clip(np.ldexp(groups, -exponent[..., None]), -448, 448))
    return codes.reshape(w.shape), (exponent + 127).astype(np.uint8)


def spread_scales(scales: Array, rows: int, columns: int) -> Array:
    """A block's scale for each row and each 32 inputs of it: FP8 as MXFP8, exact.

    uint8 (..., ceil(rows / 128), ceil(columns / 128)) -> uint8 (..., rows, columns / 32).
    """
    tall = scales.repeat(FP8_BLOCK, -2)[..., :rows, :]
    return tall.repeat(FP8_BLOCK // GROUP, -1)[..., : columns // GROUP]
