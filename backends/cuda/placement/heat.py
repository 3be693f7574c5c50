"""The heat map: how often each expert of each layer was chosen, kept between runs as JSON."""

import json
import os
import tempfile
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ds4.errors import ConfigError
from ds4.json_fields import read_json

VERSION = 1


def save_heat(path: Path, pairs: NDArray[np.int64]) -> None:
    """Write (layers, experts) counts, all or nothing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {"ds4_heat_map": VERSION, "pairs": pairs.tolist()}
    with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False) as file:
        json.dump(content, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(file.name, path)


def load_heat(path: Path, layers: int, experts: int) -> NDArray[np.int64]:
    """The counts of a file, of this model's shape. Raises ConfigError, with the remedy."""
    again = "remove it, and a new one will be made"
    content = read_json(path, ConfigError, again)
    try:
        version, pairs = content["ds4_heat_map"], np.array(content["pairs"])
    except (ValueError, KeyError, TypeError, OverflowError) as error:
        raise ConfigError(f"{path}: is no heat map ({error}); {again}") from error
    if version != VERSION or pairs.shape != (layers, experts) or pairs.dtype.kind != "i":
        raise ConfigError(
            f"{path}: is not a heat map of {layers} layers with {experts} experts; {again}"
        )
    if (pairs < 0).any():
        raise ConfigError(f"{path}: pairs: a count is negative; {again}")
    return pairs.astype(np.int64)
