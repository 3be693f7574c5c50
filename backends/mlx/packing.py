"""Cache rows to and from their packed form (ds4/quant/rows.py), on the device."""

import mlx.core as mx

from ds4.quant import formats
from ds4.quant.rows import KV_GROUP, RowFormat

from .rounding import power_of_two

_CODE = [0, 1, 2, 3, 4, 0, 5, 0, 6, 0, 0, 0, 7]  # of an e2m1 value, by twice its size


def packed(rows: mx.array, form: RowFormat) -> mx.array:
    """float32 (n, C) -> uint8 (n, bytes); of a rounded form, values that were rounded."""
    if form.kind == "kv":
        return _pack_kv(rows, form)
    return _pack_index(rows) if form.kind == "index" else mx.contiguous(rows).view(mx.uint8)


def unpacked(rows: mx.array, form: RowFormat) -> mx.array:
    """uint8 (n, bytes) -> float32 (n, C)."""
    if form.kind == "kv":
        return _unpack_kv(rows, form)
    if form.kind == "index":
        return _unpack_index(rows, form.width)
    return mx.contiguous(rows).view(mx.float32)


def _pack_kv(rows: mx.array, form: RowFormat) -> mx.array:
    count, groups = len(rows), form.plain // KV_GROUP
    plain = rows[:, : form.plain].reshape(count, groups, KV_GROUP)
    scale = power_of_two(plain, 1e-4, 448)
    codes = mx.to_fp8(plain / scale).reshape(count, -1)
    exponents = mx.pad(_exponent(scale[..., 0]), [(0, 0), (0, form.scales - groups)])
    tail = mx.contiguous(rows[:, form.plain :]).astype(mx.bfloat16).view(mx.uint8)
    return mx.concatenate([codes, exponents, tail], 1)


def _unpack_kv(rows: mx.array, form: RowFormat) -> mx.array:
    groups, tail_from = form.plain // KV_GROUP, form.plain + form.scales
    codes = rows[:, : form.plain].reshape(len(rows), groups, KV_GROUP)
    scale = _power(rows[:, form.plain : form.plain + groups])[..., None]
    plain = mx.from_fp8(codes, dtype=mx.float32) * scale
    tail = mx.contiguous(rows[:, tail_from:]).view(mx.bfloat16).astype(mx.float32)
    return mx.concatenate([plain.reshape(len(rows), -1), tail], 1)


def _pack_index(rows: mx.array) -> mx.array:
    groups = rows.reshape(len(rows), -1, formats.FP4_GROUP)
    scale = power_of_two(groups, 6 * 2.0**-126, 6)
    scaled = groups / scale
    size = mx.array(_CODE, mx.uint8)[(2 * mx.abs(scaled)).astype(mx.uint32)]
    sign = (scaled.view(mx.uint32) >> 31).astype(mx.uint8)
    codes = (size | sign << 3).reshape(len(rows), -1)
    return mx.concatenate([codes[:, ::2] | codes[:, 1::2] << 4, _exponent(scale[..., 0])], 1)


def _unpack_index(rows: mx.array, width: int) -> mx.array:
    codes = rows[:, : width // 2]
    pairs = mx.stack([codes & 15, codes >> 4], -1).reshape(len(rows), -1, formats.FP4_GROUP)
    values = mx.array(formats.E2M1)[pairs] * _power(rows[:, width // 2 :])[..., None]
    return values.reshape(len(rows), width)


def _exponent(scale: mx.array) -> mx.array:
    """Powers of two -> E8M0 bytes."""
    return (scale.view(mx.uint32) >> 23).astype(mx.uint8)


def _power(exponents: mx.array) -> mx.array:
    """E8M0 bytes, none of them 0, -> powers of two."""
    return (exponents.astype(mx.uint32) << 23).view(mx.float32)
