"""The cuda backend's packed weights, as a GPU uses them."""

from pathlib import Path

import numpy as np
import pytest
from ds4.backends.cuda import ops, weights

import ds4
from ds4.backend import open_backend
from ds4.weights.tensor import stack
from tests.fixtures import hard_weights
from tests.test_model import GATE
from tests.test_official_format import IDS, official, want

__all__ = ["official", "want"]


def test_torch_decodes_packed_weights_to_the_bit() -> None:
    """What a GPU does at each use; on a CPU the backend decodes when it loads."""
    device = open_backend("torch").device
    for tensor in hard_weights():
        found = weights.dense(weights.pack(tensor, device)).cpu().numpy()
        np.testing.assert_array_equal(found, tensor.decode())
        both = weights.pack(stack([tensor, tensor]), device)
        np.testing.assert_array_equal(weights.dense(both)[1].cpu().numpy(), tensor.decode())


def test_logits_of_packed_weights_agree(
    official: Path, want: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ops, "upload", weights.pack)
    llm = ds4.load(official, "torch", cache="exact", context=128)
    assert isinstance(llm.runner.weights.layers[0].ffn.experts.w1, weights.Packed)
    assert np.abs(llm.logits(IDS) - want).max() <= GATE
