"""Cache rows rounded to their FP8 and FP4 grids, as ds4/quant/formats.py specifies."""

import mlx.core as mx

from ds4.quant import formats


def round_kv(x: mx.array, rotary: int) -> mx.array:
    """FP8 in groups of 64 for all but the last `rotary` channels, bf16 for those."""
    plain, tail = x[..., : x.shape[-1] - rotary], x[..., x.shape[-1] - rotary :]
    groups = plain.reshape(*plain.shape[:-1], -1, 64)
    scale = power_of_two(groups, 1e-4, 448)
    rounded = mx.from_fp8(mx.to_fp8(groups / scale), dtype=mx.float32) * scale
    tail = tail.astype(mx.bfloat16).astype(mx.float32)
    return mx.concatenate([rounded.reshape(plain.shape), tail], -1)


def round_index(x: mx.array) -> mx.array:
    """Hadamard, then FP4 in groups of 32."""
    rotated = mx.hadamard_transform(x)
    groups = rotated.reshape(*x.shape[:-1], -1, formats.FP4_GROUP)
    scale = power_of_two(groups, 6 * 2.0**-126, 6)
    return (_e2m1(groups / scale) * scale).reshape(x.shape)


def power_of_two(groups: mx.array, floor: float, largest: float) -> mx.array:
    """The smallest power of two that brings a group within `largest`, exact: from float bits.

    `floor` over `largest` is a normal number, so the scale is one too.
    """
    ratio = mx.maximum(mx.abs(groups).max(-1, keepdims=True), floor) / largest
    return (ratio.view(mx.int32) + 0x7FFFFF & 0x7F800000).view(mx.float32)


def _e2m1(x: mx.array) -> mx.array:
    """Nearest of 0, .5, 1, 1.5, 2, 3, 4, 6, ties to the even code: steps of 1/2, then 1, then 2."""
    size = mx.abs(x)
    step = mx.where(size < 2, 0.5, mx.where(size < 4, 1.0, 2.0))
    return mx.round(x / step) * step
