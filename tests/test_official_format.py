"""A checkpoint of official names and dtypes gives the same logits on every backend."""

from pathlib import Path

import numpy as np
import pytest
import torch

import ds4
from tests.fixtures import official_fixture
from tests.test_model import GATE

IDS = torch.randint(0, 320, (50,), generator=torch.Generator().manual_seed(5)).tolist()


@pytest.fixture(scope="module")
def official(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("official")
    official_fixture(folder, seed=3)
    return folder


@pytest.fixture(scope="module")
def want(official: Path) -> np.ndarray:
    return ds4.load(official, "reference", cache="exact", context=128).logits(IDS)


def test_logits_agree(official: Path, want: np.ndarray, backend: str) -> None:
    got = ds4.load(official, backend, cache="exact", context=128).logits(IDS)
    assert np.abs(got - want).max() <= GATE
    assert want.std() > 0.3


def test_native_logits_stay_near(official: Path, want: np.ndarray, backend: str) -> None:
    got = ds4.load(official, backend, cache="native", context=128).logits(IDS)
    change = np.abs(got - want).mean() / want.std()
    assert 1e-3 < change < 0.5
