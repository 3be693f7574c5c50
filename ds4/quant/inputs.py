"""What each layer's experts were given while a text was read: what GPTQ's Hessians are made of.

A Hessian for each expert of each layer would be terabytes. The inputs are gigabytes, are written
once while the model runs, and are read a layer at a time while that layer is quantized.
"""

from pathlib import Path
from types import TracebackType
from typing import NamedTuple

import numpy as np

from ..config import Config
from ..errors import CheckpointError
from ..weights.shard_file import Part, ShardFile
from ..weights.shards import read_header
from .calibration import Host
from .formats import decode_bf16, encode_bf16

MOST = 32_768  # tokens recorded: of DeepSeek-V4-Flash, 11.7 GB


class LayerInputs(NamedTuple):
    """Of T tokens."""

    x: Host  # (T, D) float32, values of bf16
    ids: Host  # (T, K) experts
    weights: Host  # (T, K) float32


class Recorder:
    """Writes the file, whole or not at all; `add` is what `calibrate` wants as `watch`."""

    def __init__(self, path: Path, cfg: Config, tokens: int) -> None:
        self.tokens = min(tokens, MOST)
        parts = [
            Part(f"{layer}.{name}", dtype, (self.tokens, width))
            for layer in range(cfg.num_hidden_layers)
            for name, dtype, width in (
                ("x", "BF16", cfg.hidden_size),
                ("ids", "I32", cfg.num_experts_per_tok),
                ("weights", "F32", cfg.num_experts_per_tok),
            )
        ]
        self._left = dict.fromkeys(range(cfg.num_hidden_layers), self.tokens)
        self._file = ShardFile(path, parts, {})
        self.nbytes = self._file.nbytes

    def __enter__(self) -> "Recorder":
        self._file.__enter__()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._file.__exit__(kind, error, trace)

    def add(self, layer: int, x: Host, ids: Host, weights: Host) -> None:
        """The next tokens of a layer; those beyond the first MOST are dropped."""
        count = min(len(x), self._left[layer])
        self._left[layer] -= count
        self._file.append(f"{layer}.x", encode_bf16(x[:count]))
        self._file.append(f"{layer}.ids", ids[:count].astype(np.int32))
        self._file.append(f"{layer}.weights", weights[:count].astype(np.float32))


class Inputs:
    """Reads what a Recorder wrote. Raises CheckpointError if the file is damaged."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._stored = read_header(path)

    def layer(self, layer: int) -> LayerInputs:
        x, ids, weights = (
            self._read(f"{layer}.{name}", dtype)
            for name, dtype in (("x", np.uint16), ("ids", np.int32), ("weights", np.float32))
        )
        return LayerInputs(decode_bf16(x), ids, weights)

    def _read(self, name: str, dtype: type) -> Host:
        if name not in self._stored:
            raise CheckpointError(f"{self.path}: {name} is missing; remove the file and run again")
        stored = self._stored[name]
        array: Host = np.empty(stored.shape, dtype)
        stored.read_into(array)
        return array
