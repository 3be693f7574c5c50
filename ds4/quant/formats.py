"""The number formats of the checkpoint and of its caches, specified in NumPy.

Weights: bf16; FP8 (e4m3fn codes, one E8M0 scale per 128 x 128 block); MXFP4 (two e2m1 codes a byte,
low nibble first, one E8M0 scale per 32 inputs). Caches: the same codes with scales along a row.
An E8M0 byte b means 2^(b-127); 255 is NaN. Values multiply: weight = code * scale, exact in bf16.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
f32 = np.float32

FP8_BLOCK = 128
FP4_GROUP = 32
E8M0_NAN = 255


def _e4m3_table() -> Array:
    code = np.arange(256)
    exponent, mantissa = code >> 3 & 15, code & 7
    magnitude = np.where(exponent > 0, (8 + mantissa) * 2.0 ** (exponent - 10), mantissa * 2.0**-9)
    magnitude[(code & 127) == 127] = np.nan
    return np.where(code < 128, magnitude, -magnitude).astype(f32)


E4M3 = _e4m3_table()
E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], f32)
E8M0 = np.append(2.0 ** np.arange(-127, 128), np.nan).astype(f32)
_E2M1_PAIR = np.stack([E2M1[np.arange(256) & 15], E2M1[np.arange(256) >> 4]], -1)


# decoding


def decode_bf16(bits: Array) -> Array:
    """uint16 bit patterns -> float32, exact."""
    return (bits.astype(np.uint32) << 16).view(f32)


def decode_mxfp4(codes: Array, scales: Array) -> Array:
    """uint8 (..., K/2), uint8 (..., K/32) -> float32 (..., K)."""
    values = _E2M1_PAIR[codes].reshape(*codes.shape[:-1], -1, FP4_GROUP)
    return (values * E8M0[scales][..., None]).reshape(*codes.shape[:-1], -1)


def decode_fp8(codes: Array, scales: Array) -> Array:
    """uint8 (..., out, in), uint8 (..., ceil(out/128), ceil(in/128)) -> float32 (..., out, in)."""
    rows, columns = codes.shape[-2:]
    scale = E8M0[scales].repeat(FP8_BLOCK, -2)[..., :rows, :].repeat(FP8_BLOCK, -1)[..., :columns]
    return E4M3[codes] * scale


# encoding, round to nearest with ties to the even code


def encode_bf16(x: Array) -> Array:
    """float32 -> uint16 bit patterns."""
    bits = np.ascontiguousarray(x, f32).view(np.uint32)
    rounded = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16
    return np.where(np.isnan(x), 0x7FC0, rounded).astype(np.uint16)


def encode_e4m3(x: Array) -> Array:
    """float32 in [-448, 448] -> uint8 codes."""
    return _nearest(x, E4M3[:127])


def encode_e2m1(x: Array) -> Array:
    """float32 in [-6, 6] -> uint8 codes 0..15, one a byte."""
    code = _nearest(x, E2M1[:8])
    return code & 7 | code >> 4 & 8


def _nearest(x: Array, magnitudes: Array) -> Array:
    """Index of the nearest magnitude, ties to the even index, with the sign in bit 7."""
    x = np.asarray(x, f32)
    middle = (magnitudes[1:] + magnitudes[:-1]) / 2
    magnitude = np.abs(x)
    below, above = np.searchsorted(middle, magnitude), np.searchsorted(middle, magnitude, "right")
    code = np.where(below % 2 == 0, below, above)  # they differ only on a tie
    return (code | np.signbit(x).astype(np.int64) << 7).astype(np.uint8)


def power_of_two_above(x: Array) -> Array:
    """The exponent e of the smallest 2^e >= x, as int32; x > 0, float32."""
    mantissa, exponent = np.frexp(np.asarray(x, f32))
    return exponent - (mantissa == 0.5)


def encode_mxfp4(w: Array) -> tuple[Array, Array]:
    """float32 (..., K) -> codes uint8 (..., K/2), scales uint8 (..., K/32); K a multiple of 32."""
    groups = np.asarray(w, f32).reshape(*w.shape[:-1], -1, FP4_GROUP)
    exponent = np.maximum(power_of_two_above(_largest(groups, 6 * 2.0**-126) / f32(6)), -126)
    codes = encode_e2m1(np.clip(np.ldexp(groups, -exponent[..., None]), -6, 6))
    codes = codes.reshape(*w.shape[:-1], -1)
    return codes[..., ::2] | codes[..., 1::2] << 4, (exponent + 127).astype(np.uint8)


def encode_fp8(w: Array) -> tuple[Array, Array]:
    """float32 (out, in) -> codes uint8 (out, in), scales uint8 (ceil(out/128), ceil(in/128))."""
    rows, columns = w.shape
    tall, wide = -(-rows // FP8_BLOCK), -(-columns // FP8_BLOCK)
    padded = np.zeros((tall * FP8_BLOCK, wide * FP8_BLOCK), f32)
    padded[:rows, :columns] = w
    blocks = padded.reshape(tall, FP8_BLOCK, wide, FP8_BLOCK)
    largest = np.maximum(np.abs(blocks).max((1, 3)), f32(1e-4))
    exponent = power_of_two_above(largest / f32(448))
    scaled = np.clip(np.ldexp(blocks, -exponent[:, None, :, None]), -448, 448)
    codes = encode_e4m3(scaled).reshape(padded.shape)[:rows, :columns]
    return np.ascontiguousarray(codes), (exponent + 127).astype(np.uint8)


# rounding cache rows to their grid (specification 3.1, quantisers Q8 and Q4)


def round_q8(x: Array, group: int = 64) -> Array:
    """float32 (..., n * group), each group rounded to e4m3 times a power of two."""
    groups = np.asarray(x, f32).reshape(*x.shape[:-1], -1, group)
    exponent = power_of_two_above(_largest(groups, 1e-4) / f32(448))[..., None]
    codes = encode_e4m3(np.clip(np.ldexp(groups, -exponent), -448, 448))
    return np.ldexp(E4M3[codes], exponent).reshape(x.shape)


def round_q4(x: Array) -> Array:
    """float32 (..., n * 32), each group of 32 rounded to e2m1 times a power of two."""
    return decode_mxfp4(*encode_mxfp4(x))


def round_kv(x: Array, rotary: int) -> Array:
    """float32 (..., C): FP8 in groups of 64, but the last `rotary` channels bf16."""
    plain, tail = np.split(np.asarray(x, f32), [x.shape[-1] - rotary], -1)
    return np.concatenate([round_q8(plain), decode_bf16(encode_bf16(tail))], -1)


def _largest(groups: Array, floor: float) -> Array:
    return np.maximum(np.abs(groups).max(-1), f32(floor))


def hadamard(n: int) -> Array:
    """The n x n Sylvester matrix over sqrt(n): orthogonal and symmetric; n a power of two."""
    if n < 1 or n & (n - 1):
        raise ValueError(f"Hadamard size must be a power of two, not {n}")
    h = np.ones((1, 1))
    while len(h) < n:
        h = np.block([[h, h], [h, -h]])
    return (h / np.sqrt(n)).astype(f32)
