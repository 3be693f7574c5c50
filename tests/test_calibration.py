"""Calibration against the same sums made in NumPy from decoded weights."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import ds4
from ds4.errors import CheckpointError, PromptError
from ds4.quant import calibration
from ds4.quant.calibration import RARE, Calibration, calibrate
from ds4.quant.inputs import Inputs, Recorder
from ds4.weights import Checkpoint
from ds4.weights.names import expected
from tests.fixtures import official_fixture
from tests.test_quantize import TWO_LAYERS

IDS = np.random.default_rng(2).integers(0, 320, 60).tolist()


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("small")
    official_fixture(folder, **TWO_LAYERS)
    return folder


class Seen:
    """What `watch` is called with, a layer's rows together."""

    def __init__(self) -> None:
        self.rows: dict[int, list[Any]] = {}

    def __call__(self, layer: int, *arrays: Any) -> None:
        self.rows.setdefault(layer, []).append(arrays)

    def layer(self, layer: int) -> list[np.ndarray]:
        return [np.concatenate(each) for each in zip(*self.rows[layer], strict=True)]


def expert(folder: Path, llm: Any, layer: int, e: int, x: np.ndarray, share: np.ndarray) -> Any:
    """What w2 of an expert is given for some rows, and the expert's own output."""
    checkpoint, shapes = Checkpoint(folder), expected(llm.config)
    names = [f"layers.{layer}.ffn.experts.{e}.{w}.weight" for w in ("w1", "w2", "w3")]
    w1, w2, w3 = (checkpoint.read(name, shapes[name]).decode() for name in names)
    gate = np.minimum(x @ w1.T, llm.config.swiglu_limit)
    up = np.clip(x @ w3.T, -llm.config.swiglu_limit, llm.config.swiglu_limit)
    inner = gate / (1 + np.exp(-gate)) * up
    return inner * share[:, None], inner @ w2.T


def test_sums_are_those_of_the_decoded_weights(small: Path, backend: str) -> None:
    llm, seen = ds4.load(small, backend, cache="exact", context=128), Seen()
    before = llm.logits(IDS[:20])
    found = calibrate(llm, IDS, watch=seen)
    np.testing.assert_array_equal(llm.logits(IDS[:20]), before)
    assert found.tokens == 60
    assert found.rare == sum((count < RARE).sum() for count in found.counts.values())
    for layer in range(2):
        x, ids, weights = seen.layer(layer)
        assert x.shape == (60, llm.config.hidden_size)
        np.testing.assert_array_equal(found.counts[layer], np.bincount(ids.flatten(), minlength=8))
        squares = {"w1": [], "w2": []}
        for e in range(8):
            token, pick = np.nonzero(ids == e)
            inner, output = expert(small, llm, layer, e, x[token], weights[token, pick])
            norm = np.linalg.norm(output, axis=-1)
            want = (norm * weights[token, pick]).sum()
            np.testing.assert_allclose(found.saliency[layer][e], want, rtol=1e-3)
            squares["w1"].append(np.square(x[token]).sum(0))
            squares["w2"].append(np.square(inner).sum(0))
        count = found.counts[layer][:, None]
        for matrix, sums in squares.items():
            common = np.sum(sums, 0) / count.sum()
            blend = (np.array(sums) + RARE * common) / (count + RARE)
            for e in range(8):
                name = f"layers.{layer}.ffn.experts.{e}.{matrix}.weight"
                np.testing.assert_allclose(found.importance[name], blend[e], rtol=2e-3, atol=1e-9)


def test_every_matrix_but_routers_and_the_shared_w2(small: Path) -> None:
    llm = ds4.load(small, "reference", context=128)
    found = calibrate(llm, IDS[:8])
    shapes = expected(llm.config)
    matrices = {name for name, shape in shapes.items() if len(shape) == 2 and "weight" in name}
    left = {n for n in matrices if "ffn.gate" in n or "shared_experts.w2" in n or "embed" in n}
    assert set(found.importance) == matrices - left
    for name, importance in found.importance.items():
        assert importance.shape == shapes[name][-1:], name
        assert importance.dtype == np.float32
    one, three = (found.importance[f"layers.1.ffn.experts.5.w{i}.weight"] for i in (1, 3))
    assert one is three


def test_windows_start_from_an_empty_state(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    llm, seen, first = ds4.load(small, "reference", context=128), Seen(), Seen()
    monkeypatch.setattr(calibration, "WINDOW", 25)
    steps: list[tuple[int, int]] = []
    calibrate(llm, IDS, lambda *step: steps.append(step), seen)
    calibrate(llm, IDS[25:50], watch=first)
    assert steps == [(25, 60), (50, 60), (60, 60)]
    np.testing.assert_allclose(seen.layer(1)[0][25:50], first.layer(1)[0], atol=1e-5)
    with pytest.raises(PromptError, match="320"):
        calibrate(llm, [320])


def test_saved_and_loaded(small: Path, tmp_path: Path) -> None:
    llm = ds4.load(small, "reference", context=128)
    found, path = calibrate(llm, IDS), tmp_path / "seen.npz"
    found.save(path)
    again = Calibration.load(path)
    assert (again.tokens, again.rare) == (found.tokens, found.rare)
    for name in ("counts", "saliency", "importance"):
        here, there = getattr(found, name), getattr(again, name)
        assert here.keys() == there.keys()
        for key, value in here.items():
            np.testing.assert_array_equal(there[key], value)
    raw = path.read_bytes()
    path.write_bytes(raw[: len(raw) // 2])
    with pytest.raises(CheckpointError, match=r"seen.npz.*run the calibration again"):
        Calibration.load(path)
    np.savez(path, tokens=np.array([{}], object), allow_pickle=True)
    with pytest.raises(CheckpointError):
        Calibration.load(path)
    assert [p.name for p in tmp_path.iterdir()] == ["seen.npz"]


def test_recorded_inputs(small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    llm, seen = ds4.load(small, "reference", context=128), Seen()
    monkeypatch.setattr("ds4.quant.inputs.MOST", 40)
    monkeypatch.setattr(calibration, "WINDOW", 25)
    with Recorder(tmp_path / "inputs", llm.config, len(IDS)) as recorder:
        calibrate(llm, IDS, watch=recorder.add)
    calibrate(llm, IDS, watch=seen)
    found = Inputs(tmp_path / "inputs").layer(1)
    for got, want in zip(found, seen.layer(1), strict=True):
        np.testing.assert_allclose(got, want[:40], rtol=2**-8)
    assert found.x.dtype == found.weights.dtype == np.float32
    (tmp_path / "inputs").write_bytes(b"x" * 100)
    with pytest.raises(CheckpointError):
        Inputs(tmp_path / "inputs")
