"""Runs of the quantizer: killed, resumed, refused, out of space, and from the command line."""

import contextlib
import errno
import hashlib
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from typer.testing import CliRunner

import ds4
from ds4.cli import app
from ds4.errors import QuantizeError
from ds4.quant import quantize
from ds4.quant.arrays import open_arrays
from ds4.quant.quantize import quantize_checkpoint
from ds4.weights.shard_file import Part, ShardFile, damaged, read_about
from tests.fixtures import official_fixture
from tests.test_quantize import TWO_LAYERS, small

__all__ = ["small"]


def contents(folder: Path) -> dict[str, str]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


# killed, damaged, no space

KILLED = """
import sys
from pathlib import Path
from ds4.quant.arrays import open_arrays
from ds4.quant.quantize import quantize_checkpoint
quantize_checkpoint(sys.argv[1], sys.argv[2], "q3_K_S", progress=lambda *a: print(*a, flush=True))
"""


def test_killed_anywhere_and_resumed(small: Path, tmp_path: Path) -> None:
    whole = quantize_checkpoint(small, tmp_path / "whole", "q3_K_S")
    rng, folder = np.random.default_rng(0), tmp_path / "killed"
    killed = 0
    for _ in range(10):
        command = [sys.executable, "-c", KILLED, str(small), str(folder)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            for _ in range(int(rng.integers(1, 25))):
                process.stdout.readline()
            time.sleep(rng.random() * 0.05)
            process.kill()
        killed += process.returncode != 0
        if not (folder / "config.json").exists():
            with pytest.raises(ds4.errors.Ds4Error):
                ds4.load(folder, "reference")
    assert killed
    again = quantize_checkpoint(small, folder, "q3_K_S")
    assert (again.nbytes, again.files) == (whole.nbytes, whole.files)
    assert contents(folder) == contents(tmp_path / "whole")


def test_interrupted_run_leaves_finished_files_only(small: Path, tmp_path: Path) -> None:
    def stop(done: int, total: int) -> None:
        if done > total * 0.6:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quantize_checkpoint(small, tmp_path, "q2", "rtn", progress=stop)
    left = sorted(path.name for path in tmp_path.iterdir())
    assert left
    assert all(name.endswith(".safetensors") for name in left)
    assert quantize_checkpoint(small, tmp_path, "q2", "rtn").reused == len(left)


def test_damaged_file_is_made_again(small: Path, tmp_path: Path) -> None:
    quantize_checkpoint(small, tmp_path, "q4_K_M", "rtn")
    want = contents(tmp_path)
    shard = tmp_path / "model-00002-of-00004.safetensors"
    raw = bytearray(shard.read_bytes())
    raw[-100] ^= 4
    shard.write_bytes(raw)
    assert len(damaged(shard)) == 1
    (tmp_path / "model-00003-of-00004.safetensors.part").write_bytes(b"x")
    assert quantize_checkpoint(small, tmp_path, "q4_K_M", "rtn").reused == 3
    assert contents(tmp_path) == want


def test_foreign_folder_is_left_alone(small: Path, tmp_path: Path) -> None:
    quantize_checkpoint(small, tmp_path / "a", "q2", "rtn")
    with pytest.raises(QuantizeError, match=r"00001.*another model, recipe or method"):
        quantize_checkpoint(small, tmp_path / "a", "q3_K_S", "rtn")
    official_fixture(tmp_path / "b", seed=9, **TWO_LAYERS)
    with pytest.raises(QuantizeError, match="another model"):
        quantize_checkpoint(tmp_path / "b", tmp_path / "a", "q2", "rtn")
    shutil.copy(small / "model.safetensors", tmp_path / "c.safetensors")
    with pytest.raises(QuantizeError, match=r"c.safetensors.*another model"):
        quantize_checkpoint(small, tmp_path, "q2", "rtn")
    os.mkfifo(tmp_path / "a" / "a.safetensors")  # and nobody who writes to it
    with pytest.raises(QuantizeError, match=r"a.safetensors.*another model"):
        quantize_checkpoint(small, tmp_path / "a", "q2", "rtn")
    with pytest.raises(QuantizeError, match="is the source"):
        quantize_checkpoint(small, small, "q2")


def test_unsuitable_requests(small: Path, tmp_path: Path) -> None:
    with pytest.raises(QuantizeError, match=r"q9.*q2, .*q8_0"):
        quantize_checkpoint(small, tmp_path, "q9")
    with pytest.raises(QuantizeError, match="ls or gptq or rtn"):
        quantize_checkpoint(small, tmp_path, "q2", "magic")  # type: ignore[arg-type]
    quantize_checkpoint(small, tmp_path / "q2", "q2", "rtn")
    with pytest.raises(QuantizeError, match="already quantized to 4 bits"):
        quantize_checkpoint(tmp_path / "q2", tmp_path / "again", "q2")


def test_too_little_space(small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)
    little = usage._replace(free=1 << 20)
    monkeypatch.setattr(quantize.shutil, "disk_usage", lambda path: little)
    with pytest.raises(QuantizeError, match=r"to be written, but 1,048,576 are free; make room"):
        quantize_checkpoint(small, tmp_path, "q2", "rtn")
    assert list(tmp_path.iterdir()) == []  # and it is still there, but no new one is
    with pytest.raises(QuantizeError, match="make room"):
        quantize_checkpoint(small, tmp_path / "new", "q2", "rtn")
    assert list(tmp_path.iterdir()) == []


def test_disk_that_fills_up(small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls, append, room = itertools.count(), ShardFile.append, 0

    def fail(file: ShardFile, name: str, data: np.ndarray) -> None:
        if next(calls) >= room:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        append(file, name, data)

    monkeypatch.setattr(ShardFile, "append", fail)
    with pytest.raises(QuantizeError, match=r"No space left.*goes on where it stopped"):
        quantize_checkpoint(small, tmp_path / "new", "q2", "rtn")
    assert not (tmp_path / "new").exists()
    calls, room = itertools.count(), 41
    with pytest.raises(QuantizeError, match=r"No space left.*goes on where it stopped"):
        quantize_checkpoint(small, tmp_path, "q2", "rtn")
    assert not list(tmp_path.glob("*.part"))
    assert not (tmp_path / "config.json").exists()


# the command


def test_command(small: Path, tmp_path: Path) -> None:
    command = ["quantize", str(small), str(tmp_path / "a"), "--recipe", "q2_K_L", "--method", "rtn"]
    said = CliRunner().invoke(app, command)
    assert said.exit_code == 0
    assert "q2_K_L" in said.output
    assert "left out" not in said.output
    again = CliRunner().invoke(app, [*command, "--json"])
    report = json.loads(again.stdout)
    assert report.pop("seconds") >= 0
    assert report == {
        "folder": str(tmp_path / "a"),
        "recipe": "q2_K_L",
        "method": "rtn",
        "source_bytes": report["source_bytes"],
        "bytes": sum(p.stat().st_size for p in (tmp_path / "a").glob("*.safetensors")),
        "files": 4,
        "reused": 4,
        "left_out": [],
        "device": open_arrays().name,
        "tokens": 0,
        "rare_experts": 0,
    }
    wrong = CliRunner().invoke(app, [*command[:3], "-r", "q9"])
    assert isinstance(wrong.exception, QuantizeError)


@pytest.mark.skipif(os.name != "posix", reason="signals and terminals of POSIX")
def test_ctrl_c(small: Path, tmp_path: Path) -> None:
    """On a terminal: the bar goes, one line says what to do, nothing half-made is left."""
    pty = pytest.importorskip("pty")
    main, side = pty.openpty()
    folder = tmp_path / "made"
    command = [sys.executable, "-m", "ds4.cli", "quantize", str(small), str(folder), "-r", "q2"]
    with subprocess.Popen(command, stderr=side, stdout=side) as process:
        os.close(side)
        while not list(folder.glob("*.part")):
            assert process.poll() is None
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        seen = b""
        with contextlib.suppress(OSError):  # what a closed terminal says
            while piece := os.read(main, 4096):
                seen += piece
        assert process.wait(30) == 130
    os.close(main)
    assert b"stopped: the same command goes on from here" in seen
    assert b"Traceback" not in seen
    assert not list(folder.glob("*.part"))
    assert not (folder / "config.json").exists()


# the file


def test_shard_file_refuses_what_does_not_fill_it(tmp_path: Path) -> None:
    path, parts = tmp_path / "x.safetensors", [Part("a", "U8", (3,)), Part("b", "F32", (2,))]
    with pytest.raises(ValueError, match="not complete"), ShardFile(path, parts, {}) as file:
        file.append("a", np.zeros(3, np.uint8))
    with pytest.raises(ValueError, match="more bytes"), ShardFile(path, parts, {}) as file:
        file.append("a", np.zeros(4, np.uint8))
    assert list(tmp_path.iterdir()) == []
    with ShardFile(path, parts, {"note": 1}) as file:
        file.append("b", np.ones(1, np.float32))
        file.append("a", np.arange(3, dtype=np.uint8))
        file.append("b", np.ones(1, np.float32))
    assert path.stat().st_size == file.nbytes
    about = read_about(path)
    assert about is not None
    assert about["note"] == 1
    np.testing.assert_array_equal(mx.load(str(path))["b"], [1, 1])
    assert read_about(tmp_path / "none") is None
