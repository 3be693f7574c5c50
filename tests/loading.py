"""Loading in tests: a backend that keeps what it is given, and a second reader of the format."""

import json
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from ds4.config import Config
from ds4.errors import CheckpointError
from ds4.weights import Checkpoint, load_weights
from ds4.weights.tensor import HostTensor


class Keep:
    """A backend that only keeps what it is given."""

    def __init__(self) -> None:
        self.given: dict[str, HostTensor] = {}

    def load(self, name: str, tensor: HostTensor) -> str:
        assert name not in self.given
        self.given[name] = tensor
        return name

    def decoded(self) -> dict[str, np.ndarray]:
        return {name: tensor.decode() for name, tensor in self.given.items()}


def loaded(folder: Path) -> Keep:
    be = Keep()
    load_weights(be, Config.from_file(folder / "config.json"), Checkpoint(folder))
    return be


def same(a: Keep, b: Keep) -> None:
    assert a.given.keys() == b.given.keys()
    for name, x in a.given.items():
        np.testing.assert_array_equal(x.decode(), b.given[name].decode(), err_msg=name)


def refusal(folder: Path, cfg: dict[str, Any]) -> str:
    """The one line that loading a folder ends with."""
    with pytest.raises(CheckpointError) as error:
        load_weights(Keep(), Config.from_dict(cfg), Checkpoint(folder))
    message = str(error.value)
    assert "\n" not in message
    assert message.startswith(str(folder))
    return message


def raw_tensors(path: Path) -> dict[str, tuple[str, np.ndarray]]:
    """A file's tensors, by the format's definition: dtype and bytes shaped (..., bytes a value)."""
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header, body = json.loads(data[8 : 8 + length]), np.frombuffer(data[8 + length :], np.uint8)
    out = {}
    header.pop("__metadata__", None)
    for name, entry in header.items():
        start, end = entry["data_offsets"]
        out[name] = (entry["dtype"], body[start:end].reshape(*entry["shape"], -1))
    return out


def decode(name: str, raw: dict[str, tuple[str, np.ndarray]]) -> np.ndarray:
    """Specification 2.3, with ml_dtypes for the codes."""
    dtype, data = raw[name]
    plain = {"F32": np.float32, "I64": np.int64, "BF16": ml_dtypes.bfloat16}
    if dtype in plain:
        x = data.view(plain[dtype])[..., 0]
        return x if dtype == "I64" else x.astype(np.float32)
    scale = np.exp2(raw[name.replace(".weight", ".scale")][1][..., 0].astype(np.float32) - 127)
    if dtype == "F8_E4M3":
        rows, columns = data.shape[:2]
        blocks = np.kron(scale, np.ones((128, 128), np.float32))[:rows, :columns]
        return data[..., 0].view(ml_dtypes.float8_e4m3fn).astype(np.float32) * blocks
    assert dtype == "I8"
    nibbles = np.concatenate([data & 15, data >> 4], -1).reshape(data.shape[0], -1)
    values = np.array(
        [0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32
    )
    return values[nibbles] * np.repeat(scale, 32, 1)
