"""Random weights that are described, not stored: any machine makes the same bytes from a seed.

A byte is a hash of its place, computed with 32-bit integers on whole arrays. NumPy does it here; a
backend with a faster device gives `parts` its own `Maker` and never moves the bytes.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from ..quant import formats
from .synthetic_maker import Maker, Numpy
from .tensor import Array, HostTensor

PIECE = 1 << 26  # words made at once, which bounds what is needed beside the result
_NOISE = math.sqrt(4 * (256**2 - 1) / 12)  # standard deviation of a sum of four random bytes


@dataclass(frozen=True)
class Description:
    """What to make: values of about this mean and standard deviation in a format of HostTensor.

    Of quantized formats the mean is 0, and the deviation is met but for a factor of at most 1.5.
    """

    format: str
    shape: tuple[int, ...]  # logical
    seed: int
    std: float
    mean: float = 0.0
    bits: int = 0  # of affine, as in HostTensor
    group: int = 0
    picked: tuple[int, ...] = ()  # only these of a longer stack, in ascending order


class SyntheticTensor(HostTensor):
    """A HostTensor whose arrays are made anew whenever they are read; equal if made alike."""

    def __init__(self, spec: Description) -> None:
        set_field = object.__setattr__  # the dataclass is frozen
        set_field(self, "spec", spec)
        set_field(self, "format", spec.format)
        set_field(self, "bits", spec.bits)
        set_field(self, "group", spec.group)

    spec: Description

    def __eq__(self, other: object) -> bool:
        return isinstance(other, SyntheticTensor) and self.spec == other.spec

    def __hash__(self) -> int:
        return hash(self.spec)

    def __repr__(self) -> str:
        return f"SyntheticTensor({self.spec})"

    @property
    def data(self) -> Array:
        kinds = {"f32": np.float32, "bf16": np.uint16, "affine": np.uint32}
        codes = _data(self.spec, Numpy())
        return codes.view(kinds.get(self.format, np.uint8)).reshape(*self.shape[:-1], -1)

    @property
    def scales(self) -> Array | None:
        return self._beside(_scales(self.spec, Numpy()))

    @property
    def biases(self) -> Array | None:
        return self._beside(_biases(self.spec, Numpy()))

    def _beside(self, made: Array | None) -> Array | None:
        kind = np.uint16 if self.format == "affine" else np.uint8
        return None if made is None else made.view(kind).reshape(grid(self.spec))

    @property
    def shape(self) -> tuple[int, ...]:
        return self.spec.shape

    @property
    def nbytes(self) -> int:
        return nbytes(self.spec)

    def of_shape(self, *shape: int) -> "SyntheticTensor":
        """Other values of the same kind."""
        return SyntheticTensor(replace(self.spec, shape=shape))

    def only(self, ids: Sequence[int]) -> "SyntheticTensor":
        """Some matrices of this stack, in ascending order."""
        shape = len(ids), *self.shape[1:]
        return SyntheticTensor(replace(self.spec, shape=shape, picked=tuple(ids)))


def parts(tensor: SyntheticTensor, maker: Maker) -> tuple[Any, Any, Any]:
    """Data, scales and biases as flat uint8 arrays of `maker`; None for what the format lacks."""
    spec = tensor.spec
    return _data(spec, maker), _scales(spec, maker), _biases(spec, maker)


def nbytes(spec: Description) -> int:
    """The bytes of all its arrays."""
    count = math.prod(spec.shape)
    if spec.format in _PLAIN:
        return count * _PLAIN[spec.format]
    width = {"affine": 4}.get(spec.format, 1)
    return count * _bits(spec) // 8 + math.prod(grid(spec)) * width


_PLAIN = {"f32": 4, "bf16": 2}


def _bits(spec: Description) -> int:
    return {"mxfp4": 4, "affine": spec.bits}.get(spec.format, 8)


def grid(spec: Description) -> tuple[int, ...]:
    """The shape of its scales."""
    *stack, rows, columns = spec.shape
    if spec.format == "fp8":
        return *stack, -(-rows // formats.FP8_BLOCK), -(-columns // formats.FP8_BLOCK)
    return *stack, rows, columns // (spec.group or formats.FP4_GROUP)


# laws, on arrays of any library: four bytes or two halves in an int32


def _data(spec: Description, maker: Maker) -> Any:
    count = math.prod(spec.shape)
    if spec.format in _PLAIN:
        return _made(maker, spec, spec.seed, count * _PLAIN[spec.format], _noise(spec))
    law = _e4m3 if spec.format in ("fp8", "mxfp8") else _any
    return _made(maker, spec, spec.seed, count * _bits(spec) // 8, law)


def _noise(spec: Description) -> Any:
    factor, mean = spec.std / _NOISE, spec.mean

    def law(words: Any, maker: Maker) -> Any:
        pairs = (words & 0x00FF00FF) + (words >> 8 & 0x00FF00FF)
        values = maker.to_floats((pairs & 0xFFFF) + (pairs >> 16) - 510) * factor + mean
        return maker.to_bf16(values) if spec.format == "bf16" else values

    return law


def _any(words: Any, maker: Maker) -> Any:
    return words


def _e4m3(words: Any, maker: Maker) -> Any:
    """Codes of either sign and magnitudes from 2^-3 to 7.5: exponent fields 4 to 9."""
    size = (words >> 2 & 0x1F1F1F1F) + (words >> 3 & 0x0F0F0F0F) + 0x20202020
    return size | words & _signed(0x80808080)


def _scales(spec: Description, maker: Maker) -> Any:
    if spec.format in _PLAIN:
        return None
    count = math.prod(grid(spec))
    if spec.format == "affine":
        return _made(maker, spec, ~spec.seed, 2 * count, _affine_scale(spec))
    exponent = round(math.log2(spec.std / (_code_deviation(spec) * 1.25)))
    byte = (126 + exponent) * 0x01010101

    def law(words: Any, maker: Maker) -> Any:
        """The exponent and one less or more, which has the root mean square 1.25."""
        return (words & 0x01010101) + (words >> 1 & 0x01010101) + _signed(byte)

    return _made(maker, spec, ~spec.seed, count, law)


def _code_deviation(spec: Description) -> float:
    """Root mean square of the values of random codes."""
    if spec.format == "mxfp4":
        return float(np.sqrt(np.mean(formats.E2M1**2.0)))
    every = np.arange(256, dtype=np.int32)
    return float(np.sqrt(np.mean(formats.E4M3[_e4m3(every, Numpy()) & 255] ** 2.0)))


def _affine_scale(spec: Description) -> Any:
    """A power of two times 1, 1.25, 1.5 or 1.75, in bfloat16: root mean square 1.40."""
    deviation = math.sqrt((4**spec.bits - 1) / 12)
    exponent = round(math.log2(spec.std / (deviation * 1.4)))
    half = (127 + exponent) << 7

    def law(words: Any, maker: Maker) -> Any:
        return (words & 0x00600060) + half * 0x00010001

    return law


def _biases(spec: Description, maker: Maker) -> Any:
    """Minus the scale times the mean code: then values have mean 0."""
    if spec.format != "affine":
        return None
    scales = _affine_scale(spec)
    count = math.prod(grid(spec))
    middle = -(2**spec.bits - 1) / 2

    def law(words: Any, maker: Maker) -> Any:
        pairs = scales(words, maker)
        low = maker.to_bf16(maker.as_floats(pairs << 16) * middle)
        high = maker.to_bf16(maker.as_floats(pairs & _signed(0xFFFF0000)) * middle)
        return _interleaved(maker, low, high)

    return _made(maker, spec, ~spec.seed, 2 * count, law)


def _interleaved(maker: Maker, low: Any, high: Any) -> Any:
    out = maker.empty(4 * len(low)).reshape(-1, 2, 2)
    out[:, 0] = maker.as_bytes(low).reshape(-1, 2)
    out[:, 1] = maker.as_bytes(high).reshape(-1, 2)
    return out.reshape(-1)


def _made(maker: Maker, spec: Description, seed: int, nbytes: int, law: Any) -> Any:
    """`nbytes` of what `law` makes of random words, a piece at a time."""
    out = maker.empty(nbytes)
    word = 2 if spec.format == "bf16" else 4  # bytes that come of one
    done = 0
    for start, stop in _runs(spec, nbytes):
        for first in range(start // word, -(-stop // word), PIECE):
            last = min(first + PIECE, -(-stop // word))
            made = maker.as_bytes(law(_hash(maker.count(first, last), seed), maker))
            made = made[max(0, start - first * word) : stop - first * word]
            out[done : done + len(made)] = made
            done += len(made)
    return out


def _runs(spec: Description, nbytes: int) -> Iterator[tuple[int, int]]:
    """Which bytes of the whole stack are wanted: of all matrices, or of those picked."""
    if not spec.picked:
        yield 0, nbytes
        return
    each, ids = nbytes // len(spec.picked), np.array(spec.picked)
    for run in np.split(ids, np.flatnonzero(np.diff(ids) != 1) + 1):
        yield int(run[0]) * each, (int(run[-1]) + 1) * each


def _hash(x: Any, seed: int) -> Any:
    """Numbers 0, 1, 2 ... into random ones, in place (a xorshift-multiply hash)."""
    for key, shift, keep, factor in _ROUNDS:
        x += _signed(seed * key + factor)
        x ^= x >> shift & keep
        x *= _signed(factor)
    x ^= x >> 16 & 0xFFFF
    return x


_ROUNDS = (
    (0x9E3779B9, 16, 0xFFFF, 0x7FEB352D),
    (0x85EBCA6B, 15, 0x1FFFF, 0x846CA68B),
)


def _signed(x: int) -> int:
    """The low 32 bits as an int32, which is what both libraries multiply and add."""
    return ((x & 0xFFFFFFFF) ^ 0x80000000) - 0x80000000
