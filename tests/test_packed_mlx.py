"""The MLX backend's packed weights, as a Mac's GPU uses them."""

from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from ds4.backends.mlx import ops, weights

import ds4
from tests.fixtures import hard_weights
from tests.test_model import GATE
from tests.test_official_format import IDS, official, want

__all__ = ["official", "want"]


def test_mlx_multiplies_packed_weights_exactly() -> None:
    """What a Mac's GPU does at each use; on a CPU the backend decodes when it loads."""
    eye = mx.eye(256)
    for tensor in hard_weights():
        packed = weights.pack(tensor)
        assert isinstance(packed, weights.Packed)
        np.testing.assert_array_equal(np.array(packed.matmul(eye)).T, tensor.decode())


def test_logits_of_packed_weights_agree(
    official: Path, want: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ops, "upload", lambda tensor, device: weights.pack(tensor))
    llm = ds4.load(official, "mlx", cache="exact", context=128)
    assert isinstance(llm.runner.weights.layers[0].ffn.experts.w1, weights.Packed)
    assert np.abs(llm.logits(IDS) - want).max() <= GATE
