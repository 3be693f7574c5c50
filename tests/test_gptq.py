"""GPTQ: the factor, the feedback, the recorded inputs, and what they are worth on the demo."""

import contextlib
import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

import ds4
from ds4.cli import app
from ds4.errors import QuantizeError
from ds4.loader import find_model
from ds4.quant.affine import decode_affine
from ds4.quant.arrays import CPU, Arrays, TorchArrays, open_arrays
from ds4.quant.calibration import Calibration, calibrate
from ds4.quant.gptq import DAMPING, encode_gptq, factor
from ds4.quant.inputs import Inputs, Recorder
from ds4.quant.least_squares import encode_least_squares
from ds4.quant.quantize import quantize_checkpoint
from tests.fixtures import official_fixture
from tests.loading import loaded
from tests.test_packing import values
from tests.test_quantize import TWO_LAYERS

DEMO = find_model("demo")


@pytest.fixture(params=["numpy", "torch"])
def on(request: pytest.FixtureRequest) -> Arrays:
    return CPU if request.param == "numpy" else TorchArrays("cpu")


def correlated(count: int, inputs: int) -> np.ndarray:
    rng = np.random.default_rng(3)
    mix = rng.standard_normal((inputs // 2, inputs))
    noise = rng.standard_normal((count, inputs))
    x = rng.standard_normal((count, inputs // 2)) @ mix / inputs**0.5 + 0.3 * noise
    return (x.T @ x / count).astype(np.float64)


def cost(encoded: Any, w: np.ndarray, bits: int, group: int, hessian: np.ndarray) -> float:
    d = (decode_affine(*encoded, bits, group).reshape(w.shape) - w).astype(np.float64)
    return float((d @ hessian * d).sum())


def test_factor_of_the_inverse(on: Arrays) -> None:
    hessian = correlated(40, 64)  # not of full rank
    upper = on.get(factor(on.put(hessian[None]), on))[0].astype(np.float64)
    damped = hessian + DAMPING * np.diag(hessian).mean() * np.eye(64)
    np.testing.assert_allclose(upper.T @ upper @ damped, np.eye(64), atol=1e-5)
    assert not np.tril(upper, -1).any()


@pytest.mark.parametrize(("bits", "group"), [(2, 64), (2, 128), (3, 128)])
def test_feedback_lowers_the_error_of_outputs(bits: int, group: int, on: Arrays) -> None:
    w, hessian = values(2 * 48, 256).reshape(2, 48, 256), correlated(1000, 256)
    upper = factor(on.put(hessian[None]), on)
    found = encode_gptq(on.put(w), bits, group, upper, on)
    plain = encode_least_squares(on.put(w), bits, group, None, on)
    mine, theirs = (cost(x, w, bits, group, hessian) for x in (found, plain))
    assert mine < 0.6 * theirs
    alone = [encode_gptq(on.put(each[None]), bits, group, upper, on) for each in w]
    for part, each in zip(found, zip(*alone, strict=True), strict=True):
        assert (part != np.concatenate(each)).mean() < 1e-3


def test_without_correlation_it_is_least_squares(on: Arrays) -> None:
    w = values(48, 256)
    upper = factor(on.put(np.eye(256)[None] * 3), on)
    found = encode_gptq(on.put(w[None]), 2, 64, upper, on)
    plain = encode_least_squares(on.put(w), 2, 64, on.put(np.ones(256, np.float32)), on)
    for a, b in zip(found, plain, strict=True):
        assert (a[0] != b).mean() < 1e-3


def test_torch_and_numpy_find_the_same() -> None:
    w, there = values(64, 512), TorchArrays("cpu")
    importance = np.exp(np.random.default_rng(1).standard_normal(512)).astype(np.float32)
    for bits, group in ((2, 128), (3, 64), (6, 64)):
        here = encode_least_squares(w, bits, group, importance)
        other = encode_least_squares(there.put(w), bits, group, there.put(importance), there)
        a, b = (cost(x, w, bits, group, np.diag(importance)) for x in (here, other))
        assert abs(a - b) < 1e-3 * a
        assert (here[0] != other[0]).mean() < 0.02


def test_devices() -> None:
    assert open_arrays("cpu") is CPU
    with pytest.raises(QuantizeError, match="auto, cpu or cuda"):
        open_arrays("tpu")


# whole runs


@pytest.fixture(scope="module")
def tokenized(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small model with the demo's tokenizer, and a text beside it."""
    folder = tmp_path_factory.mktemp("tokenized")
    official_fixture(folder / "model", **TWO_LAYERS | {"vocab_size": 4096})
    shutil.copy(DEMO / "tokenizer.json", folder / "model")
    (folder / "text.txt").write_text((DEMO / "heldout.txt").read_text()[:2500])
    return folder


KILLED = """
import sys
from ds4.quant.quantize import quantize_checkpoint
say = lambda *a: print(*a, flush=True)
quantize_checkpoint(sys.argv[1], sys.argv[2], "q2_K_L", "gptq", calibrate=sys.argv[3],
                    backend="reference", device="cpu", progress=say, reading=say)
"""


def contents(folder: Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.iterdir()}


def test_killed_anywhere_and_resumed(tokenized: Path, tmp_path: Path) -> None:
    def run(folder: Path) -> Any:
        return quantize_checkpoint(
            tokenized / "model",
            folder,
            "q2_K_L",
            "gptq",
            calibrate=tokenized / "text.txt",
            backend="reference",
            device="cpu",
        )

    whole = run(tmp_path / "whole")
    assert whole.tokens > 500
    rng, folder = np.random.default_rng(0), tmp_path / "killed"
    paths = [str(path) for path in (tokenized / "model", folder, tokenized / "text.txt")]
    for lines in (1, 4, 14):  # while it reads, at the start, in the first layer
        command = [sys.executable, "-c", KILLED, *paths]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            for _ in range(lines):
                process.stdout.readline()
            time.sleep(rng.random() * 0.03)
            process.kill()
        assert process.returncode != 0
        assert not (folder / "config.json").exists()
    run(folder)
    assert contents(folder) == contents(tmp_path / "whole")
    assert run(folder).tokens == 0  # nothing left to do: nothing is read


@pytest.mark.parametrize("method", ["ls", "gptq"])
def test_a_whole_run_in_torch(
    tokenized: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: Any
) -> None:
    def run(name: str) -> Any:
        text = tokenized / "text.txt"
        return quantize_checkpoint(
            tokenized / "model", tmp_path / name, "q3_K_S", method, calibrate=text, device="cpu"
        )

    run("numpy")
    there = TorchArrays("cpu")
    monkeypatch.setattr("ds4.quant.quantize.open_arrays", lambda device: there)
    assert "torch" in run("torch").device
    one, two = (loaded(tmp_path / name).given for name in ("numpy", "torch"))
    for name, tensor in one.items():
        a, b = tensor.decode(), two[name].decode()
        assert np.square(a - b).sum() <= 1e-3 * np.square(a).sum(), name
    monkeypatch.undo()
    with pytest.raises(QuantizeError, match="or made on another device"):
        run("torch")


def test_command(tokenized: Path, tmp_path: Path) -> None:
    paths = [str(tokenized / "model"), str(tmp_path / "made")]
    options = ["-r", "q2", "--calibrate", str(tokenized / "text.txt"), "-b", "reference"]
    said = CliRunner().invoke(app, ["quantize", *paths, *options])
    assert said.exit_code == 0, said.output
    assert "tokens, of which" in said.output
    assert "experts saw too few" in said.output
    manifest = json.loads((tmp_path / "made" / "manifest.json").read_text())
    assert manifest["quantizer"]["text"]
    assert not list((tmp_path / "made").glob("calibration-*"))
    ds4.load(tmp_path / "made", "reference").logits([5, 6, 7])


def test_requests_that_make_no_sense(tokenized: Path, tmp_path: Path) -> None:
    model, text = tokenized / "model", tokenized / "text.txt"
    with pytest.raises(QuantizeError, match="--calibrate"):
        quantize_checkpoint(model, tmp_path / "x", "q2", "gptq")
    with pytest.raises(QuantizeError, match="rtn has no use"):
        quantize_checkpoint(model, tmp_path / "x", "q2", "rtn", calibrate=text)
    with pytest.raises(QuantizeError, match=r"none\.txt: cannot be read as text"):
        quantize_checkpoint(model, tmp_path / "x", "q2", calibrate=tmp_path / "none.txt")
    (tmp_path / "short.txt").write_text("Too short.")
    with pytest.raises(QuantizeError, match=r"short\.txt: has \d+ tokens; give at least"):
        quantize_checkpoint(model, tmp_path / "x", "q2", calibrate=tmp_path / "short.txt")
    assert not (tmp_path / "x").exists()


@pytest.mark.skipif(sys.platform != "linux" or os.geteuid(), reason="mounts a file system")
def test_a_disk_that_is_really_full(tokenized: Path, tmp_path: Path) -> None:
    """Another program fills the disk in the middle; afterwards the same call goes on."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=48m", "tmpfs", str(disk)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("may not mount")
    try:
        _fill_and_go_on(tokenized / "model", disk)
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def _fill_and_go_on(model: Path, disk: Path) -> None:
    folder, filler = disk / "made", disk / "filler"

    def fill(done: int, total: int) -> None:
        if done > total * 0.6 and not filler.exists():
            with filler.open("wb") as file, contextlib.suppress(OSError):
                for _ in range(1 << 12):
                    file.write(bytes(1 << 16))
                    file.flush()

    with pytest.raises(QuantizeError, match=r"No space left.*goes on where it stopped"):
        quantize_checkpoint(model, folder, "q2", "rtn", progress=fill)
    left = sorted(path.name for path in folder.iterdir())
    assert left
    assert all(name.endswith(".safetensors") for name in left)
    with pytest.raises(ds4.errors.Ds4Error):
        ds4.load(folder, "reference")
    filler.unlink()
    assert quantize_checkpoint(model, folder, "q2", "rtn").reused == len(left)


# what it is worth


class Worth:
    """KL divergence of a quantized demo model from the demo, on the second half of its text."""

    def __init__(self, folder: Path) -> None:
        llm = ds4.load("demo", "cuda", "cpu", cache="exact", context=2048)
        ids = llm.encode((DEMO / "heldout.txt").read_text())
        self.seen, self.unseen = ids[:6000], ids[len(ids) // 2 :][:1024]
        self.reference = _log_probabilities(llm, self.unseen)
        self.folder = folder
        with Recorder(folder / "inputs", llm.config, len(self.seen)) as recorder:
            self.calibration: Calibration = calibrate(llm, self.seen, watch=recorder.add)

    def __call__(self, recipe: str, method: Any) -> float:
        made = self.folder / f"{recipe}-{method}"
        importance = None if method == "rtn" else self.calibration.importance
        inputs = Inputs(self.folder / "inputs") if method == "gptq" else None
        quantize_checkpoint(DEMO, made, recipe, method, importance, inputs=inputs)
        llm = ds4.load(made, "cuda", "cpu", cache="exact", context=2048)
        found = _log_probabilities(llm, self.unseen)
        return float((np.exp(self.reference) * (self.reference - found)).sum(-1).mean())


def _log_probabilities(llm: Any, ids: list[int]) -> np.ndarray:
    logits = llm.logits(ids).astype(np.float64)
    logits -= logits.max(-1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


def test_methods_on_the_demo(tmp_path: Path) -> None:
    worth = Worth(tmp_path)
    for recipe in ("q2", "q3_K_S"):
        rounded, squares, gptq = (worth(recipe, method) for method in ("rtn", "ls", "gptq"))
        assert squares <= 0.6 * rounded, recipe
        assert gptq <= squares, recipe
