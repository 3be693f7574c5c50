"""A checkpoint of random bytes in the official formats, for any config: to check and to measure."""

import numpy as np

from ..config import Config
from .export import storage_format
from .names import Shape, expected
from .tensor import HostTensor, stack


class SyntheticCheckpoint:
    """Reads like `Checkpoint`: the same tensor has the same values each time it is read."""

    def __init__(self, cfg: Config, seed: int = 0) -> None:
        self.cfg, self.seed = cfg, seed
        self._order = {name: i for i, name in enumerate(expected(cfg))}

    def check(self, cfg: Config) -> int:
        """The bytes of all tensors."""
        return sum(_nbytes(name, shape) for name, shape in expected(cfg).items())

    def read(self, name: str, shape: Shape, below: int | None = None) -> HostTensor:
        rng = np.random.default_rng((self.seed, self._order[name]))
        if below is not None:
            picks = rng.random((shape[0], below)).argsort(-1)[:, : shape[1]]
            return HostTensor("int", picks)
        kind = storage_format(name)
        if kind == "mxfp4":
            return _mxfp4(rng, shape)
        if kind == "fp8":
            return _fp8(rng, shape)
        values = _plain(rng, name, shape)
        if kind == "bf16":
            return HostTensor("bf16", (values.view(np.uint32) >> 16).astype(np.uint16))
        return HostTensor("f32", values)

    def read_stacked(self, names: list[str], shape: Shape) -> HostTensor:
        return stack([self.read(name, shape) for name in names])


def _nbytes(name: str, shape: Shape) -> int:
    count = int(np.prod(shape))
    if storage_format(name) == "fp8":
        return count + int(np.prod([-(-n // 128) for n in shape]))
    bits = {"mxfp4": 4.25, "bf16": 16, "f32": 32, "int": 64}[storage_format(name)]
    return int(count * bits / 8)


def _mxfp4(rng: np.random.Generator, shape: Shape) -> HostTensor:
    """Uniform codes, whose values have the root mean square 2.93."""
    rows, columns = shape
    codes = rng.integers(0, 256, (rows, columns // 2), np.uint8)
    return HostTensor("mxfp4", codes, _scales(rng, (rows, columns // 32), columns, 2.93))


def _fp8(rng: np.random.Generator, shape: Shape) -> HostTensor:
    """Codes of exponents 2^-3 to 2^2, whose values have the root mean square 2.5."""
    codes = (
        rng.integers(4 << 3, 10 << 3, shape, np.uint8) | rng.integers(0, 2, shape, np.uint8) << 7
    )
    blocks = tuple(-(-n // 128) for n in shape)
    return HostTensor("fp8", codes, _scales(rng, blocks, shape[-1], 2.5))


def _scales(rng: np.random.Generator, shape: Shape, fan_in: int, rms: float) -> np.ndarray:
    """Scale bytes that keep the size of activations, give or take a factor of two."""
    exponent = int(np.rint(np.log2(1 / (rms * np.sqrt(fan_in)))))
    return (127 + exponent + rng.integers(-1, 2, shape)).astype(np.uint8)


def _plain(rng: np.random.Generator, name: str, shape: Shape) -> np.ndarray:
    noise = rng.standard_normal(shape, np.float32)
    if "norm" in name:
        return 1 + np.float32(0.3) * noise
    if name.endswith("_scale"):
        return np.float32(0.5) + rng.random(shape, np.float32)
    if len(shape) == 2 and not name.endswith("ape") and name != "embed.weight":
        return noise * np.float32(shape[-1] ** -0.5)
    return noise
