"""Quantizing a checkpoint: lossless where it should be, resumable, atomic, and better than RTN."""

import json
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np
import pytest
import xxhash

import ds4
from ds4.config import Config
from ds4.quant.affine import decode_affine, encode_affine
from ds4.quant.arrays import open_arrays
from ds4.quant.formats import encode_fp8
from ds4.quant.least_squares import encode_least_squares
from ds4.quant.quantize import MANIFEST, Summary, quantize_checkpoint
from ds4.quant.recipes import RECIPES
from ds4.weights import Checkpoint
from ds4.weights.names import expected, expected_drafter
from ds4.weights.shard_file import damaged
from tests.fixtures import (
    official_fixture,
    official_tensors,
    plain_fixture,
    random_official_state,
    small_config,
    write_folder,
)
from tests.loading import loaded, raw_tensors, same
from tests.test_official_format import IDS
from tests.test_packing import values

CFG = Config.from_dict(small_config())
TWO_LAYERS: dict[str, Any] = {
    "num_hidden_layers": 2,
    "num_hash_layers": 1,
    "compress_ratios": [0, 4, 0],
    "vocab_size": 320,
}


@pytest.fixture(scope="module")
def official(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("official")
    official_fixture(folder, seed=3, shards=2)
    (folder / "generation_config.json").write_text("{}")
    return folder


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two layers, for what has to be made many times."""
    folder = tmp_path_factory.mktemp("small")
    official_fixture(folder, **TWO_LAYERS)
    return folder


def quantization(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text())["quantization"]


# what is made


class Made(NamedTuple):
    folder: Path
    summary: Summary


@pytest.fixture(scope="module", params=RECIPES)
def made(request: pytest.FixtureRequest, official: Path, tmp_path_factory: Any) -> Made:
    folder = tmp_path_factory.mktemp(request.param)
    return Made(folder, quantize_checkpoint(official, folder, request.param, "rtn"))


def test_each_weight_has_the_format_of_the_recipe(official: Path, made: Made) -> None:
    recipe, source, found = RECIPES[made.summary.recipe], Checkpoint(official), Checkpoint(made[0])
    assert [extra.kind for extra in found.extras] == ["mtp"]
    for name, shape in (expected(CFG) | expected_drafter(CFG, "mtp")).items():
        layout, before = found.layout(name, shape), source.layout(name, shape)
        wanted = recipe.format_of(name, shape[-1])
        if wanted is None and before.format == "fp8":  # of the drafter
            assert layout.format == "mxfp8"
        elif wanted is None:
            assert layout.data.dtype == before.data.dtype
        else:
            assert layout.format == wanted.mode
        if wanted is not None and wanted.mode == "affine":
            assert (layout.bits, layout.group) == (wanted.bits, wanted.group)
        here, there = (x.read(name, shape).decode() for x in (found, source))
        if wanted is None or wanted.mode != "affine":
            np.testing.assert_array_equal(here, there, err_msg=name)
        else:
            error = np.square(here - there).mean() / np.square(there).mean()
            assert error < {2: 0.4, 3: 0.08, 4: 0.02}.get(wanted.bits, 0.005), name


def test_the_manifest_holds_the_checksum_of_each_tensor(made: Made) -> None:
    manifest = json.loads((made.folder / MANIFEST).read_text())
    assert manifest["format"] == 1
    assert manifest["recipe"] == made.summary.recipe
    quantizer = {"method": "rtn", "device": open_arrays().name, "importance": None, "text": None}
    assert manifest["quantizer"] == quantizer
    sums = {}
    for path in made.folder.glob("*.safetensors"):
        assert damaged(path) == []
        for name, (_, data) in raw_tensors(path).items():
            sums[name] = {"xxh3_128": xxhash.xxh3_128_hexdigest(data.tobytes())}
    assert manifest["tensors"] == sums


def test_mlx_multiplies_what_it_loads(made: Made) -> None:
    """The words straight from mx.load, as config.json describes them."""
    path = "layers.3.ffn.experts.w1"
    shard = made.folder / "model-00005-of-00009.safetensors"
    tensors, how = mx.load(str(shard)), quantization(made.folder)[path]
    want = loaded(made.folder).given[path].decode()
    x = np.random.default_rng(0).standard_normal((4, 1, want.shape[-1]), np.float32)
    ids = np.array([7, 0, 3, 3], np.uint32)
    got = mx.gather_qmm(
        mx.array(x),
        tensors[f"{path}.weight"],
        tensors[f"{path}.scales"],
        tensors.get(f"{path}.biases"),
        rhs_indices=mx.array(ids),
        **how,
    )
    np.testing.assert_allclose(got, x @ want[ids].swapaxes(1, 2), atol=1e-4)


def test_summary_and_files(official: Path, made: Made) -> None:
    summary = made.summary
    assert (summary.files, summary.reused, summary.left_out) == (9, 0, ())
    shards = sorted(made.folder.glob("*.safetensors"))
    assert summary.nbytes == sum(path.stat().st_size for path in shards)
    assert summary.source_bytes == Checkpoint(official).check_all(CFG)
    others = {"config.json", "generation_config.json", "manifest.json"}
    index = "model.safetensors.index.json"
    assert {p.name for p in made.folder.iterdir()} == {*(s.name for s in shards), *others, index}
    assert "quantization_config" not in json.loads((made.folder / "config.json").read_text())


def test_q8_0_is_the_same_model(official: Path, tmp_path: Path, backend: str) -> None:
    quantize_checkpoint(official, tmp_path, "q8_0")
    before, after = (
        ds4.load(folder, backend, cache="exact", context=128).logits(IDS)
        for folder in (official, tmp_path)
    )
    np.testing.assert_array_equal(before, after)


def test_experts_that_were_never_fp4_get_the_bits_of_the_name(tmp_path: Path) -> None:
    plain_fixture(tmp_path / "plain", dtype="BF16", **TWO_LAYERS)
    for recipe, bits in (("q5_K_M", 5), ("q8_0", 8)):
        folder = tmp_path / recipe
        quantize_checkpoint(tmp_path / "plain", folder, recipe, "rtn")
        found = quantization(folder)["layers.0.ffn.experts.w2"]
        assert found == {"group_size": 64, "bits": bits, "mode": "affine"}
        assert quantization(folder)["layers.0.ffn.gate"] is False


def test_fp8_experts(tmp_path: Path) -> None:
    """A Base model's: kept by q8_0, five bits in q5_K_M."""
    cfg = small_config(**TWO_LAYERS, expert_dtype="fp8")
    state = random_official_state(cfg)
    tensors = official_tensors(state)
    for name in state:
        if ".experts." in name:
            codes, scales = encode_fp8(state[name])
            tensors[name] = "F8_E4M3", codes.shape, codes.tobytes()
            tensors[name.replace(".weight", ".scale")] = "F8_E8M0", scales.shape, scales.tobytes()
    write_folder(tmp_path / "base", cfg, tensors)
    quantize_checkpoint(tmp_path / "base", tmp_path / "q8_0", "q8_0", "rtn")
    quantize_checkpoint(tmp_path / "base", tmp_path / "q5_K_M", "q5_K_M", "rtn")
    same(loaded(tmp_path / "base"), loaded(tmp_path / "q8_0"))
    assert loaded(tmp_path / "q8_0").given["layers.1.ffn.experts.w1"].format == "mxfp8"
    assert loaded(tmp_path / "q5_K_M").given["layers.1.ffn.experts.w1"].bits == 5


# least squares


@pytest.mark.parametrize(
    ("bits", "group"), [(2, 128), (2, 64), (3, 128), (4, 64), (6, 64), (8, 64)]
)
def test_least_squares_beats_rounding(bits: int, group: int) -> None:
    w = values(48, 512)
    importance = np.exp(np.random.default_rng(1).standard_normal(512)).astype(np.float32)

    def error(encoded: tuple[np.ndarray, ...], weight: Any = 1) -> float:
        return float((weight * np.square(decode_affine(*encoded, bits, group) - w)).sum())

    rounded = encode_affine(w, bits, group)
    plain = encode_least_squares(w, bits, group)
    weighted = encode_least_squares(w, bits, group, importance)
    assert error(plain) < {2: 0.72, 3: 0.8, 4: 0.85, 6: 0.95, 8: 0.95}[bits] * error(rounded)
    assert error(weighted, importance) < 0.98 * error(plain, importance)
    even = encode_least_squares(w, bits, group, np.ones(512, np.float32))
    assert error(even) < 1.001 * error(plain)


def test_least_squares_on_degenerate_groups() -> None:
    w = np.zeros((4, 128), np.float32)
    w[1], w[2], w[3, 7] = 0.5, -3, 1e-30
    for bits in (2, 4, 8):
        found = decode_affine(*encode_least_squares(w, bits, 64), bits, 64)
        np.testing.assert_allclose(found, w, atol=1e-6, rtol=0)


def test_importance_reaches_the_matrix_it_names(small: Path, tmp_path: Path) -> None:
    name = "layers.0.ffn.experts.3.w1.weight"
    weight = {name: np.linspace(0.01, 1, 256, dtype=np.float32)}
    quantize_checkpoint(small, tmp_path / "a", "q2")
    quantize_checkpoint(small, tmp_path / "b", "q2", importance=weight)
    a, b = (loaded(tmp_path / x).given["layers.0.ffn.experts.w1"].data for x in "ab")
    assert [e for e in range(8) if (a[e] != b[e]).any()] == [3]
    manifest = json.loads((tmp_path / "b" / MANIFEST).read_text())
    assert manifest["quantizer"]["importance"]
