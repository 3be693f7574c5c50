"""Memory while loading: the loaded size plus one layer."""

import tracemalloc
import weakref
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from ds4.config import Config
from ds4.weights import Checkpoint, load_weights
from ds4.weights.tensor import HostTensor
from tests.fixtures import official_fixture, plain_fixture
from tests.loading import Keep, raw_tensors


class Copy(Keep):
    """A backend that copies into a layout of its own, as a device does."""

    def __init__(self) -> None:
        super().__init__()
        self.kept: list[np.ndarray] = []
        self.seen: list[weakref.ref] = []

    def load(self, name: str, tensor: HostTensor) -> SimpleNamespace:
        alive = [ref for ref in self.seen if ref() is not None]
        assert not alive, "the loader still holds an earlier tensor"
        self.seen.append(weakref.ref(tensor.data))
        arrays = [x.copy() for x in (tensor.data, tensor.scales) if x is not None]
        self.kept += arrays
        return SimpleNamespace(arrays=arrays)


def layer_bytes(folder: Path, layer: int) -> int:
    raw = raw_tensors(folder / "model.safetensors")
    return sum(x.nbytes for name, (_, x) in raw.items() if name.startswith(f"layers.{layer}."))


@pytest.mark.parametrize("backend", [Keep, Copy])
@pytest.mark.parametrize("write", [official_fixture, plain_fixture])
def test_memory_peaks_at_the_loaded_size_and_one_layer(
    tmp_path: Path, backend: type[Keep], write: Callable
) -> None:
    cfg = Config.from_dict(write(tmp_path, n_routed_experts=16))
    checkpoint, be = Checkpoint(tmp_path), backend()
    load_weights(Keep(), cfg, checkpoint)  # imports and caches, not counted below
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        weights = load_weights(be, cfg, checkpoint)
        now, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    total, layer = checkpoint.check(cfg), max(layer_bytes(tmp_path, i) for i in range(7))
    assert weights is not None
    assert now - before < total + layer / 4  # what the backend holds, and a little bookkeeping
    assert peak - before < total + layer
