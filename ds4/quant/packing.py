"""Codes of 2 to 8 bits packed into uint32 words, as MLX packs them.

A row is one little-endian bit stream: code i is bits [i * b, (i + 1) * b), bit 0 the lowest of
word 0. So 8 codes fill b bytes, 32 codes fill b words, and no code touches more than two bytes.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]

BITS = (2, 3, 4, 5, 6, 8)


def pack(codes: Array, bits: int) -> Array:
    """uint8 codes (..., K) below 2^bits -> uint32 words (..., K * bits / 32)."""
    _check(codes.shape[-1] * bits, bits)
    return as_words(stream_bytes(codes.astype(np.int16), bits, np).astype(np.uint8))


def stream_bytes(codes: Any, bits: int, xp: Any) -> Any:
    """int16 codes (..., K) -> int16 bytes of the stream (..., K * bits / 8); xp: numpy or torch."""
    eights = codes.reshape(*codes.shape[:-1], -1, 8)
    stream: list[Any] = [0] * bits
    for i in range(8):
        byte, shift = divmod(i * bits, 8)
        spread = eights[..., i] << shift
        stream[byte] = stream[byte] | spread & 255
        if shift + bits > 8:
            stream[byte + 1] = stream[byte + 1] | spread >> 8
    return xp.stack(stream, -1).reshape(*codes.shape[:-1], -1)


def as_words(stream: Array) -> Array:
    """uint8 bytes (..., 4 n) -> uint32 words (..., n)."""
    return np.ascontiguousarray(stream).view("<u4").astype(np.uint32, copy=False)


def unpack(words: Array, bits: int) -> Array:
    """uint32 words (..., K * bits / 32) -> uint8 codes (..., K)."""
    _check(words.shape[-1] * 32, bits)
    stream = np.ascontiguousarray(words, "<u4").view(np.uint8)
    stream = stream.reshape(*words.shape[:-1], -1, bits)
    eights = np.empty((*stream.shape[:-1], 8), np.uint8)
    for i in range(8):
        byte, shift = divmod(i * bits, 8)
        spread = stream[..., byte] >> shift
        if shift + bits > 8:
            spread |= stream[..., byte + 1] << (8 - shift)
        eights[..., i] = spread & ((1 << bits) - 1)
    return eights.reshape(*words.shape[:-1], -1)


def _check(stream_bits: int, bits: int) -> None:
    if bits not in BITS:
        raise ValueError(f"codes have 2, 3, 4, 5, 6 or 8 bits, not {bits}")
    if stream_bits % (32 * bits):
        raise ValueError(f"a row of {stream_bits} bits is not a multiple of 32 codes of {bits}")
