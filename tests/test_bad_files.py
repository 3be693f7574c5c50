"""Damaged and hostile files and folders: each is one clear line that names the file."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ds4.config import Config
from ds4.errors import CheckpointError
from ds4.weights import Checkpoint, load_weights
from ds4.weights.shards import INDEX
from tests.fixtures import (
    Tensors,
    official_tensors,
    random_official_state,
    small_config,
    write_folder,
    write_safetensors,
)
from tests.loading import Keep, refusal

CFG = small_config(num_hidden_layers=4, compress_ratios=[0, 4, 8, 4], num_hash_layers=1)


@pytest.fixture(scope="module")
def good() -> Tensors:
    return official_tensors(random_official_state(CFG))


def test_a_good_folder_is_not_refused(tmp_path: Path, good: Tensors) -> None:
    write_folder(tmp_path, CFG, good, shards=3)
    load_weights(Keep(), Config.from_dict(CFG), Checkpoint(tmp_path))


@pytest.mark.parametrize("keep", [0, 7, 8, 100, 20_000, 1_000_000, -1])
def test_truncated_shard(tmp_path: Path, good: Tensors, keep: int) -> None:
    write_folder(tmp_path, CFG, good, shards=2)
    shard = tmp_path / "model-00002-of-00002.safetensors"
    shard.write_bytes(shard.read_bytes()[:keep])
    message = refusal(tmp_path, CFG)
    assert message.startswith(f"{shard}: is truncated")
    assert message.endswith("download it again")


def test_file_cut_after_it_was_opened(tmp_path: Path, good: Tensors) -> None:
    write_folder(tmp_path, CFG, good)
    checkpoint, file = Checkpoint(tmp_path), tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:50_000])
    with pytest.raises(CheckpointError, match=r"model\.safetensors: .* the file ended early"):
        load_weights(Keep(), Config.from_dict(CFG), checkpoint)


@pytest.mark.parametrize("listed", [False, True])
def test_a_pipe_is_no_weight_file(tmp_path: Path, good: Tensors, listed: bool) -> None:
    """Opening it would wait for whoever writes to it."""
    write_folder(tmp_path, CFG, good, shards=2)
    if not listed:
        (tmp_path / INDEX).unlink()
    shard = tmp_path / "model-00002-of-00002.safetensors"
    shard.unlink()
    os.mkfifo(shard)
    assert f"{shard}: is no regular file" in refusal(tmp_path, CFG)


def test_trailing_bytes(tmp_path: Path, good: Tensors) -> None:
    write_folder(tmp_path, CFG, good)
    with (tmp_path / "model.safetensors").open("ab") as file:
        file.write(b"more")
    assert "model.safetensors: has 4 bytes after its last tensor" in refusal(tmp_path, CFG)


def entry(dtype: Any = "F32", shape: Any = (2,), offsets: Any = (0, 8)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


HEADERS: list[tuple[Any, str]] = [
    ([], "not a JSON object"),
    ("not JSON", "not a JSON object"),
    ({"x": 3}, "x: its header entry is not an object"),
    ({"x": entry(dtype="F33")}, "x: dtype F33 is unknown"),
    ({"x": entry(dtype=None)}, "x: dtype None is unknown"),
    ({"x": entry(shape=[-2])}, "x: shape [-2]"),
    ({"x": entry(shape=[2.0])}, "x: shape [2.0]"),
    ({"x": entry(shape=[True])}, "x: shape [True]"),
    ({"x": entry(shape=2)}, "x: shape 2"),
    ({"x": entry(offsets=[0])}, "x: data_offsets [0]"),
    ({"x": entry(offsets=[8, 0])}, "x: data_offsets [8, 0]"),
    ({"x": entry(offsets=[-8, 0])}, "x: data_offsets [-8, 0]"),
    ({"x": entry(shape=[3])}, "x: data_offsets span 8 bytes, but F32 [3] takes 12"),
    ({"x": entry(shape=[2**62, 2**62])}, "x: data_offsets span 8 bytes"),
    ({"x": entry("F4", [15])}, "x: data_offsets span 8 bytes, but F4 [15] takes 7.5"),
    ({"x": entry(), "y": entry()}, "data_offsets overlaps"),
    ({"x": entry(shape=[1], offsets=[4, 8])}, "x: data_offsets leaves a gap"),
    ({"x": entry(offsets=[0, 8]), "y": entry(shape=[1], offsets=[12, 16])}, "y: data_offsets"),
    ({"x": entry(shape=[4], offsets=[0, 16])}, "is truncated"),
    ({"x": entry(shape=[1], offsets=[0, 4])}, "has 4 bytes after"),
]


@pytest.mark.parametrize(("header", "words"), HEADERS)
def test_hostile_header(tmp_path: Path, header: Any, words: str) -> None:
    text = json.dumps(header).encode()
    file = tmp_path / "model.safetensors"
    file.write_bytes(len(text).to_bytes(8, "little") + text + bytes(8))
    message = refusal(tmp_path, CFG)
    assert message.startswith(f"{file}: ")
    assert words in message


RAW_HEADERS = [
    (b"{", "is not valid JSON"),
    (b"\xff\xfe", "is not valid JSON"),
    (b"[" * 100_000, "is not valid JSON"),
    (b'{"x": 1, "x": 2}', "names x twice"),
    (b'{"x\\ny\\u001b": 1}', "its header entry is not an object"),
]


@pytest.mark.parametrize(("text", "words"), RAW_HEADERS)
def test_header_that_is_no_json(tmp_path: Path, text: bytes, words: str) -> None:
    file = tmp_path / "model.safetensors"
    file.write_bytes(len(text).to_bytes(8, "little") + text)
    message = refusal(tmp_path, CFG)
    assert words in message
    assert message.isprintable()


@pytest.mark.parametrize("length", [2**63, 2**64 - 1, 10**12])
def test_header_length_beyond_the_file(tmp_path: Path, length: int) -> None:
    file = tmp_path / "model.safetensors"
    file.write_bytes(length.to_bytes(8, "little") + b"{}" * 100)
    assert f"{file}: is truncated or no safetensors file" in refusal(tmp_path, CFG)


# folders and indexes


def reindex(folder: Path, change: Callable[[dict], Any]) -> Path:
    """Change the weight_map of a folder's index."""
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    change(index["weight_map"])
    path.write_text(json.dumps(index))
    return path


def test_index_naming_a_missing_file(tmp_path: Path, good: Tensors) -> None:
    write_folder(tmp_path, CFG, good, shards=3)
    (tmp_path / "model-00002-of-00003.safetensors").unlink()
    message = refusal(tmp_path, CFG)
    assert "index.json: names model-00002-of-00003.safetensors, which is missing" in message
    assert "download" in message


def test_index_naming_a_tensor_that_is_elsewhere(tmp_path: Path, good: Tensors) -> None:
    write_folder(tmp_path, CFG, good, shards=2)
    file = "model-00002-of-00002.safetensors"
    path = reindex(tmp_path, lambda m: m.update({"embed.weight": file}))
    assert f"{path}: says that embed.weight is in {file}, but it is not" in refusal(tmp_path, CFG)
    reindex(tmp_path, lambda m: m.update({"embed.weight": file.replace("2-of", "1-of")}))
    reindex(tmp_path, lambda m: m.update({"no.such.tensor": file}))
    assert f"{path}: says that no.such.tensor is in {file}" in refusal(tmp_path, CFG)


HOSTILE = [
    "../model-00001-of-00002.safetensors",
    "/etc/passwd",
    "/tmp/x.safetensors",
    "sub/x.safetensors",
    "..\\x.safetensors",
    "C:\\x.safetensors",
    "",
    "..",
    "pytorch_model.bin",
    "x\0.safetensors",
    None,
    3,
]


@pytest.mark.parametrize("file", HOSTILE)
def test_index_naming_a_file_outside_the_folder(tmp_path: Path, good: Tensors, file: Any) -> None:
    write_folder(tmp_path, CFG, good, shards=2)
    path = reindex(tmp_path, lambda m: m.update({"embed.weight": file}))
    message = refusal(tmp_path, CFG)
    assert message.startswith(f"{path}: weight_map says that embed.weight is in ")
    assert message.isprintable()


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"weight_map": {}}', '{"weight_map": 3}'])
def test_index_that_is_none(tmp_path: Path, good: Tensors, text: str) -> None:
    write_folder(tmp_path, CFG, good, shards=2)
    path = tmp_path / "model.safetensors.index.json"
    path.write_text(text)
    assert refusal(tmp_path, CFG).startswith(f"{path}: ")


def test_a_tensor_in_two_files(tmp_path: Path, good: Tensors) -> None:
    write_folder(tmp_path, CFG, good)
    write_safetensors(tmp_path / "old.safetensors", {"norm.weight": good["norm.weight"]})
    assert "old.safetensors: norm.weight: is also in model.safetensors" in refusal(tmp_path, CFG)


@pytest.mark.parametrize("suffix", ["bin", "pt", "pth", "pkl", "ckpt"])
def test_a_pickle_file_is_refused_and_not_opened(tmp_path: Path, suffix: str) -> None:
    file = tmp_path / f"pytorch_model.{suffix}"
    file.write_bytes(b"cos\nsystem\n(S'exit 1'\ntR.")
    message = refusal(tmp_path, CFG)
    assert message.startswith(f"{file}: is a pickle file, refused")
    assert "run" in message
    assert "safetensors" in message


def test_an_empty_folder_and_no_folder(tmp_path: Path) -> None:
    assert "holds no *.safetensors file" in refusal(tmp_path, CFG)
    assert "is not a folder" in refusal(tmp_path / "nowhere", CFG)


@pytest.mark.parametrize("shape", [(6, 256), (8, 255, 256), (8 * 256 * 256,)])
def test_stacked_experts_of_a_wrong_shape(tmp_path: Path, shape: tuple[int, ...]) -> None:
    name = "model.layers.0.mlp.experts.gate_up_proj"
    data = bytes(4 * int(np.prod(shape)))
    write_safetensors(tmp_path / "model.safetensors", {name: ("F32", shape, data)})
    assert f"{name}: has shape" in refusal(tmp_path, CFG)
