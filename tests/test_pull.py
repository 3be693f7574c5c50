"""ds4 pull, against a hub of our own that drops connections; nothing leaves this machine."""

import errno
import json
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from ds4.loader import find_model
from ds4.weights import download
from ds4.weights.download import DownloadError, RemoteFile, Survey
from tests.fixtures import official_fixture
from tests.hub import COMMIT, HUB_ID, Hub

LARGE = "model-00001-of-00002.safetensors"  # 41 MB: the hub client keeps pieces of 10 MB
NOT_WANTED = "README.md", "pytorch_model.bin", "original/model.safetensors", "inference/model.py"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pull") / "model"
    official_fixture(folder, shards=2, vocab_size=40_000)
    for name in (*NOT_WANTED, "encoding/encoding_dsv4.py"):
        path = folder / name
        path.parent.mkdir(exist_ok=True)
        path.write_text("{}")
    shutil.copy(find_model("demo") / "tokenizer.json", folder)
    return folder


@pytest.fixture
def hub(model: Path):
    server = Hub(model)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture
def ds4(hub: Hub, tmp_path: Path):
    """Runs ds4 with the hub client's cache in a folder of its own."""

    def run(*arguments: str, **more: str):
        ours = {name: text for name, text in os.environ.items() if not name.startswith("HF_")}
        proxies = dict.fromkeys(("NO_PROXY", "no_proxy"), "127.0.0.1")
        hub_env = {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "hf"), "COLUMNS": "400"}
        quiet = {"HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_DISABLE_XET": "1"}
        return subprocess.run(
            [sys.executable, "-m", "ds4.cli", *arguments],
            env=ours | proxies | hub_env | quiet | more,
            capture_output=True,
            text=True,
            timeout=120,
        )

    return run


def one_line(done: subprocess.CompletedProcess) -> str:
    assert done.returncode == 1
    assert done.stderr.startswith(f"error: {HUB_ID}: ")
    assert done.stderr.count("\n") == 1
    return done.stderr


def same(a: Path, b: Path) -> bool:
    return a.read_bytes() == b.read_bytes()


def test_a_download_with_dropped_connections_is_complete_and_verified(ds4, hub, model):
    hub.drops = 2
    done = ds4("pull", HUB_ID, "--json")
    assert (done.returncode, done.stderr) == (0, "")
    report = json.loads(done.stdout)
    assert (report["ok"], report["checksums"], report["commit"]) == (True, "hub", COMMIT)
    folder = Path(report["folder"])
    names = [file["name"] for file in report["files"]]
    assert not set(names) & set(NOT_WANTED)
    assert sorted(names) == sorted(str(p.relative_to(folder)) for p in files(folder))
    assert all(same(folder / name, model / name) for name in names)
    starts = [start for name, start in hub.asked if name == LARGE]
    assert len(starts) == 3
    assert starts == sorted(set(starts)), "each answer goes on where the last one ended"
    again = json.loads(ds4("pull", HUB_ID, "--json").stdout)
    assert (again["ok"], again["missing_bytes"]) == (True, 0)
    found = ds4("verify", HUB_ID, "--full", HF_HUB_OFFLINE="1")
    assert (found.returncode, found.stderr) == (0, "")
    assert "every checksum is that of the hub" in found.stdout


def files(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]


def test_an_interrupted_download_goes_on(ds4, hub):
    hub.drops, hub.denied = 1, 403
    assert "answered with status 403" in one_line(ds4("pull", HUB_ID))
    assert "ds4 pull" in ds4("verify", HUB_ID).stderr  # half a model is none
    found = json.loads(ds4("pull", HUB_ID, "--dry-run", "--json").stdout)
    here = {file["name"] for file in found["files"] if file["cached"]}
    assert here
    assert LARGE not in here
    hub.asked.clear()
    hub.drops, hub.denied = 0, 0
    done = ds4("pull", HUB_ID)
    assert (done.returncode, done.stderr) == (0, "")
    assert "complete and sound" in done.stdout
    assert LARGE in dict(hub.asked)
    assert not here & set(dict(hub.asked))


def test_parts_that_a_killed_download_left_are_removed(monkeypatch, tmp_path):
    monkeypatch.setattr(download, "cache_root", lambda: tmp_path)
    blobs = tmp_path / "models--someone--small-v4" / "blobs"
    blobs.mkdir(parents=True)
    old, new, whole = (blobs / name for name in ("a.1.incomplete", "b.2.incomplete", "c"))
    for path in (old, new, whole):
        path.write_bytes(b"x")
    os.utime(old, (0, 0))
    os.utime(whole, (0, 0))
    download.remove_stale_parts(HUB_ID)
    assert sorted(blobs.iterdir()) == [new, whole]
    assert download.cached_bytes(HUB_ID) == 1


def test_damage_is_found(ds4):
    folder = Path(json.loads(ds4("pull", HUB_ID, "--quick", "--json").stdout)["folder"])
    blob = (folder / "model-00002-of-00002.safetensors").resolve()
    data = bytearray(blob.read_bytes())
    data[-1] ^= 1
    blob.write_bytes(data)
    assert ds4("pull", HUB_ID, "--quick").returncode == 0
    done = ds4("pull", HUB_ID)
    assert done.returncode == 1
    assert f"remove {blob}" in done.stderr
    assert "model-00002-of-00002.safetensors: is damaged" in done.stderr


def test_a_dry_run_brings_nothing(ds4, hub, tmp_path):
    report = json.loads(ds4("pull", HUB_ID, "--dry-run", "--json").stdout)
    sizes = {file["name"]: file["bytes"] for file in report["files"]}
    assert sizes[LARGE] > 40_000_000
    assert report["bytes"] == report["missing_bytes"] == sum(sizes.values())
    assert "folder" not in report
    assert hub.asked == []
    text = ds4("pull", HUB_ID, "--dry-run").stdout
    assert all(name in text for name in sizes)
    assert "README" not in text


def test_clear_errors(ds4, hub):
    hub.refusal = 403, "GatedRepo"
    assert f"accept its terms on {hub.url}/{HUB_ID}" in one_line(ds4("pull", HUB_ID))
    hub.refusal = 404, "RepoNotFound"
    assert "check the id" in one_line(ds4("pull", HUB_ID))
    hub.refusal = None
    assert "has no revision v9" in one_line(ds4("pull", HUB_ID, "--revision", "v9"))
    assert "HF_HUB_OFFLINE is set" in one_line(ds4("pull", HUB_ID, HF_HUB_OFFLINE="1"))
    dead = one_line(ds4("pull", HUB_ID, HF_ENDPOINT="http://127.0.0.1:9"))
    assert "http://127.0.0.1:9 cannot be reached" in dead
    assert "is no hub id" in ds4("pull", "a/b/c").stderr


def test_a_repository_without_weights(ds4, hub, tmp_path):
    hub.folder = tmp_path / "empty"
    hub.folder.mkdir()
    (hub.folder / "config.json").write_text("{}")
    assert "has no *.safetensors" in one_line(ds4("pull", HUB_ID))


# the disk


def test_a_disk_too_small_is_refused_before_the_download(monkeypatch, tmp_path):
    monkeypatch.setattr(download, "cache_root", lambda: tmp_path / "not" / "yet")
    huge = Survey(HUB_ID, COMMIT, (RemoteFile("model.safetensors", 1 << 60, False),))
    with pytest.raises(DownloadError, match=r"needs 1152921504\.9 GB more.*HF_HOME"):
        download.download(huge)


def test_a_disk_that_fills_up():
    try:
        raise RuntimeError("worker") from OSError(errno.ENOSPC, "No space left on device")
    except RuntimeError as error:
        clear = download.explain(error, HUB_ID)
    assert "the disk is full" in str(clear)
    assert clear.lasting


def test_giving_up_after_attempts_that_bring_nothing(monkeypatch, tmp_path):
    import huggingface_hub

    monkeypatch.setattr(download, "cache_root", lambda: tmp_path)
    blob = tmp_path / "models--someone--small-v4" / "blobs" / "x"
    blob.parent.mkdir(parents=True)
    calls, notes = [], []

    def fail(*args, **kwargs):
        calls.append(1)
        if len(calls) == 3:  # something came: the count begins anew
            blob.write_bytes(b"x")
        raise ConnectionError("broken pipe")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(DownloadError, match=r"the connection broke \(broken pipe\)"):
        download.download(Survey(HUB_ID, COMMIT, ()), pause=0, report=notes.append)
    assert len(calls) == 2 + download.ATTEMPTS
    assert len(notes) == len(calls) - 1
