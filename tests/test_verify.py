"""ds4 verify: a flipped bit, a truncation and a swapped tensor are each found and named."""

import hashlib
import json
import os
import shutil
from pathlib import Path

import pytest
import xxhash

from ds4.errors import ConfigError
from ds4.loader import find_model, load
from ds4.weights.shards import open_folder
from ds4.weights.verify import verify
from tests.fixtures import official_fixture
from tests.test_cli import run

__all__ = ["run"]  # a fixture

SHARDS = 3
WQ_A, WKV = "layers.1.attn.wq_a.weight", "layers.1.attn.wkv.weight"


def write_manifest(folder: Path) -> None:
    """The manifest that ds4 quantize writes."""
    entries = {}
    for name, stored in open_folder(folder).items():
        entries[name] = {"xxh3_128": xxhash.xxh3_128_hexdigest(read(stored))}
    manifest = {"format": 1, "recipe": "q8_0", "source": {}, "quantizer": {}, "tensors": entries}
    (folder / "manifest.json").write_text(json.dumps(manifest))


def read(stored) -> bytes:
    return stored.path.read_bytes()[stored.offset : stored.offset + stored.nbytes]


def write(stored, data: bytes) -> None:
    with stored.path.open("r+b") as file:
        file.seek(stored.offset)
        file.write(data)


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("verify") / "model"
    official_fixture(folder, shards=SHARDS)
    shutil.copy(find_model("demo") / "tokenizer.json", folder)
    write_manifest(folder)
    return folder


@pytest.fixture
def folder(original: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(original, tmp_path / "model"))


def problem(folder: Path, full: bool = True) -> str:
    """The one problem of a folder."""
    report = verify(folder, full)
    assert not report.ok
    assert len(report.problems) == 1
    return report.problems[0]


def test_a_good_folder(folder):
    steps = []
    report = verify(folder, full=True, progress=lambda done, total: steps.append((done, total)))
    assert (report.ok, report.problems, report.checksums) == (True, [], "manifest")
    assert (report.files, report.tensors) == (SHARDS, len(open_folder(folder)))
    assert report.nbytes == sum(stored.nbytes for stored in open_folder(folder).values())
    assert steps == sorted(steps)
    assert steps[-1] == (report.nbytes, report.nbytes)


def test_every_flipped_bit_is_found(folder):
    tensors = open_folder(folder)
    for name in ("embed.weight", WQ_A, "layers.4.ffn.experts.7.w2.scale", "mtp.0.enorm.weight"):
        stored = tensors[name]
        good = read(stored)
        for at in (0, len(good) // 2, len(good) - 1):
            bad = bytearray(good)
            bad[at] ^= 1 << at % 8
            write(stored, bytes(bad))
            assert f"{stored.path}: {name}: is damaged" in problem(folder)
            assert verify(folder).ok  # only --full reads values
        write(stored, good)
    assert verify(folder, full=True).ok


def test_a_swap_names_both_tensors(folder):
    tensors = open_folder(folder)
    a, b = (tensors[f"layers.3.ffn.experts.{e}.w1.weight"] for e in (2, 5))
    first, second = read(a), read(b)
    write(a, second)
    write(b, first)
    report = verify(folder, full=True)
    assert len(report.problems) == 2
    assert f"{a.name}: is swapped: its bytes are those of {b.name}" in report.problems[0]
    assert f"{b.name}: is swapped: its bytes are those of {a.name}" in report.problems[1]


def test_swapped_names_are_found(folder):
    """The data stay, the header says that they are each other's."""
    a, b = "layers.3.ffn.experts.2.w1.weight", "layers.3.ffn.experts.5.w1.weight"
    path = open_folder(folder)[a].path
    data = path.read_bytes()
    mark = b'"' + a.encode() + b'"', b'"' + b.encode() + b'"'
    for old, new in ((mark[0], b'"?"'), (mark[1], mark[0]), (b'"?"', mark[1])):
        data = data.replace(old, new, 1)
    path.write_bytes(data)
    assert all("swapped" in line for line in verify(folder, full=True).problems)
    assert len(verify(folder, full=True).problems) == 2


@pytest.mark.parametrize("cut", [1, 1000, 10**9])
def test_a_truncation_is_found_without_full(folder, cut):
    path = folder / "model-00002-of-00003.safetensors"
    os.truncate(path, max(0, path.stat().st_size - cut))
    assert problem(folder, full=False).startswith(f"{path}: is truncated")


def test_every_truncated_file_is_named(folder):
    paths = sorted(folder.glob("*.safetensors"))[:2]
    for path in paths:
        os.truncate(path, 100)
    problems = verify(folder).problems
    assert [line.partition(": ")[0] for line in problems] == [str(path) for path in paths]


def test_a_damaged_tokenizer(folder):
    (folder / "tokenizer.json").write_text("{}")
    (problem,) = verify(folder).problems
    assert "tokenizer.json" in problem


@pytest.mark.parametrize(
    ("said", "word"),
    [
        ('{"temperature": ', "line 1"),
        ('{"temperature": "x"}', "should be a number"),
        ("[]", "object"),
    ],
)
@pytest.mark.parametrize("full", [False, True])
def test_sampling_options_that_loading_refuses(folder, said, word, full):
    path = folder / "generation_config.json"
    path.write_text(said)
    found = problem(folder, full)
    assert found.startswith(f"{path}: ")
    assert word in found
    with pytest.raises(ConfigError) as refused:
        load(folder, "reference", context=32)
    assert str(refused.value) == found


def test_each_file_beside_the_weights_has_its_line(folder):
    for name in ("config.json", "tokenizer.json", "generation_config.json"):
        (folder / name).write_text("{")
    lines = verify(folder).problems
    assert [Path(line.partition(": ")[0]).name for line in lines] == [
        "config.json",
        "tokenizer.json",
        "generation_config.json",
    ]


def test_a_folder_without_a_tokenizer_is_sound_with_a_note(run, folder):
    words = folder / "tokenizer.json"
    words.unlink()
    status, out, err = run("verify", str(folder))
    assert status == 0
    assert "sound" in " ".join(out.split())
    assert err.startswith(f"note: {words} is missing")
    report = json.loads(run("verify", str(folder), "--json")[1])
    assert report["ok"]
    assert len(report["notes"]) == 1
    assert run("verify", "demo")[2] == ""


def test_a_missing_file(folder):
    (folder / "model-00003-of-00003.safetensors").unlink()
    assert "model-00003-of-00003.safetensors, which is missing" in problem(folder)
    assert "config.json" in verify(folder / "nothing").problems[0]


def test_a_config_of_another_model(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"n_routed_experts": 16}))
    assert "layers.0.ffn.experts.8.w1.weight [128, 256] is missing" in problem(folder, False)


# manifests


def test_a_manifest_that_is_a_pipe(folder):
    (folder / "manifest.json").unlink()
    os.mkfifo(folder / "manifest.json")  # and nobody who writes to it
    assert "manifest.json: is no regular file" in verify(folder).problems[0]


def test_a_manifest_of_other_tensors(folder):
    path = folder / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["tensors"]["new.weight"] = manifest["tensors"].pop(WKV)
    path.write_text(json.dumps(manifest))
    lines = verify(folder).problems
    assert "lists new.weight, which is in no file" in lines[0]
    assert f"{WKV}: is not listed in manifest.json" in lines[1]


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("{", "is not valid JSON"),
        ("[]", "format should be 1"),
        ('{"format": 2, "tensors": {}}', "format should be 1"),
        ('{"format": 1}', "xxh3_128"),
        ('{"format": 1, "tensors": {"a": {"xxh3_128": "12"}}}', "32 hex digits"),
        ('{"format": 1, "tensors": {"a": 3}}', "32 hex digits"),
    ],
)
def test_a_bad_manifest(folder, text, word):
    (folder / "manifest.json").write_text(text)
    line = problem(folder)
    assert line.startswith(f"{folder / 'manifest.json'}: ")
    assert word in line


def test_without_checksums_every_value_is_read(folder):
    (folder / "manifest.json").unlink()
    report = verify(folder, full=True)
    assert (report.ok, report.checksums) == (True, None)
    write(open_folder(folder)[WQ_A], b"\x7f")
    assert verify(folder).ok
    assert f"{WQ_A}: the value at [0, 0] is NaN" in problem(folder)


# the hub's cache


@pytest.fixture
def snapshot(folder: Path, tmp_path: Path) -> Path:
    """The folder as the hub client keeps it: links to blobs that are named by their sums."""
    (folder / "manifest.json").unlink()
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "abc"
    blobs.mkdir()
    snapshot.mkdir(parents=True)
    for path in folder.iterdir():
        data = path.read_bytes()
        if path.suffix == ".safetensors":
            name = hashlib.sha256(data).hexdigest()
        else:
            name = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
        path.rename(blobs / name)
        (snapshot / path.name).symlink_to(blobs / name)
    return snapshot


def test_sums_of_the_hub(snapshot):
    report = verify(snapshot, full=True)
    assert (report.ok, report.checksums) == (True, "hub")
    write(open_folder(snapshot)[WQ_A], b"\x01\x02\x03")
    assert "is damaged: sha256 is" in problem(snapshot)


def test_a_small_file_of_the_hub(snapshot):
    path = snapshot / "config.json"
    path.resolve().write_text(path.read_text() + " ")
    assert problem(snapshot).startswith(f"{path}: is damaged: sha1 is")
    assert verify(snapshot).ok


# the command


def test_verify_command(run, folder):
    status, out, err = run("verify", str(folder), "--full")
    assert (status, err) == (0, "")
    assert "every checksum is that of manifest.json" in " ".join(out.split())
    assert run("verify", "demo")[0] == 0
    report = json.loads(run("verify", str(folder), "--json")[1])
    assert (report["ok"], report["full"], report["problems"]) == (True, False, [])


def test_verify_command_with_problems(run, folder):
    tensors = open_folder(folder)
    for name in (WQ_A, WKV):
        write(tensors[name], b"\x01\x02\x03")
    status, out, err = run("verify", str(folder), "--full")
    assert (status, out) == (1, "")
    lines = err.splitlines()
    assert len(lines) == 2
    assert all(line.startswith("error: ") and "is damaged" in line for line in lines)
    assert {WQ_A, WKV} == {line.split(": ")[2] for line in lines}
    status, out, err = run("verify", str(folder), "--full", "--json")
    assert (status, err) == (1, "")
    assert len(json.loads(out)["problems"]) == 2
