"""A folder in the shared format: read strictly, the same on every backend, packed or decoded."""

import copy
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ds4.backends.cuda import ops as torch_ops
from ds4.backends.cuda import weights as torch_weights
from ds4.backends.mlx import ops as mlx_ops
from ds4.backends.mlx import weights as mlx_weights

import ds4
from ds4.weights.names import is_matrix
from ds4.weights.tensor import HostTensor, stack
from tests.fixtures import (
    Tensors,
    plain_tensors,
    random_official_state,
    small_config,
    write_folder,
)
from tests.loading import loaded, refusal
from tests.test_model import GATE
from tests.test_official_format import IDS
from tests.test_packing import encode

KINDS = {
    "embed": "affine4-64",
    "head": "affine6-64",
    "ffn.experts.w1": "affine2-128",
    "ffn.experts.w2": "affine3-64",
    "ffn.experts.w3": "mxfp4",
    "ffn.shared_experts.w1": "affine5-128",
    "attn.wq_a": "mxfp8",
    "attn.wq_b": "affine8-64",
    "attn.wo_a": "mxfp8",
    "attn.wo_b": "affine6-64",
    "attn.compressor.wkv": "affine8-64",
    "attn.compressor.wgate": "affine8-64",
    "attn.indexer.compressor.wkv": "affine8-64",
    "attn.indexer.compressor.wgate": "mxfp8",
}
Change = Callable[[Tensors, dict[str, Any]], None]


def shared_tensors(state: dict[str, np.ndarray]) -> tuple[Tensors, dict[str, Any]]:
    """The tensors of a shared-format file, and config.json's "quantization"."""
    plain: dict[str, np.ndarray] = {}
    modules: dict[str, list[np.ndarray]] = {}
    for name, x in state.items():
        module = re.sub(r"\.experts\.\d+\.", ".experts.", name.removesuffix(".weight"))
        if (is_matrix(name, x.shape) or name == "embed.weight") and kind_of(module):
            modules.setdefault(module, []).append(x)
        else:
            plain[name] = x
    tensors, table = plain_tensors(plain), {"group_size": 64, "bits": 4, "mode": "affine"}
    for module, xs in modules.items():
        kind = kind_of(module)
        each = [encode(kind, x) for x in xs]
        tensor = stack(each) if ".experts." in module else each[0]
        tensors |= stored(module, tensor)
        table[module] = entry(tensor)
    return tensors, table


def kind_of(module: str) -> str:
    return KINDS.get(module) or KINDS.get(module.split(".", 2)[-1], "")


def stored(module: str, tensor: HostTensor) -> Tensors:
    words = np.ascontiguousarray(tensor.data).view(np.uint32)
    out: Tensors = {f"{module}.weight": ("U32", words.shape, words.tobytes())}
    scales, biases = tensor.scales, tensor.biases
    assert scales is not None
    out[f"{module}.scales"] = ("BF16" if tensor.bits else "U8", scales.shape, scales.tobytes())
    if biases is not None:
        out[f"{module}.biases"] = ("BF16", biases.shape, biases.tobytes())
    return out


def entry(tensor: HostTensor) -> dict[str, Any]:
    if tensor.format == "affine":
        return {"group_size": tensor.group, "bits": tensor.bits, "mode": "affine"}
    return {"group_size": 32, "bits": 4 if tensor.format == "mxfp4" else 8, "mode": tensor.format}


@pytest.fixture(scope="module")
def good() -> tuple[Tensors, dict[str, Any]]:
    tensors, table = shared_tensors(random_official_state(small_config(), 4))
    return tensors, small_config() | {"quantization": table}


@pytest.fixture(scope="module")
def shared(good: tuple[Tensors, dict[str, Any]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shared")
    write_folder(folder, good[1], good[0], shards=2)
    return folder


@pytest.fixture(scope="module")
def want(shared: Path) -> np.ndarray:
    return ds4.load(shared, "reference", cache="exact", context=128).logits(IDS)


# reading


def test_the_fixture_has_every_format(good: tuple[Tensors, dict[str, Any]]) -> None:
    tensors, table = good[0], good[1]["quantization"]
    assert tensors["layers.0.ffn.experts.w1.weight"][1] == (8, 128, 256 * 2 // 32)
    assert tensors["layers.6.ffn.experts.w2.biases"][1] == (8, 256, 128 // 64)
    modes = {(e["mode"], e["bits"]) for e in table.values() if isinstance(e, dict)}
    assert {("affine", bits) for bits in (2, 3, 4, 5, 6, 8)} < modes
    assert {("mxfp4", 4), ("mxfp8", 8)} < modes


def test_weights_arrive_as_they_were_encoded(shared: Path) -> None:
    given, state = loaded(shared).given, random_official_state(small_config(), 4)
    first = given["layers.3.ffn.experts.w1"]
    assert (first.format, first.bits, first.group) == ("affine", 2, 128)
    assert first.shape == (8, 128, 256)
    for expert in range(8):
        want = encode("affine2-128", state[f"layers.3.ffn.experts.{expert}.w1.weight"])
        np.testing.assert_array_equal(first.data[expert], want.data)
    assert given["layers.2.attn.wo_a"].format == "mxfp8"
    assert given["layers.2.attn.wo_a"].shape == (2, 128, 256)
    assert given["layers.2.attn.compressor.wkv_gate"].format == "affine"
    mixed = given["layers.2.attn.indexer.compressor.wkv_gate"]
    assert mixed.format == "f32"
    path = "layers.2.attn.indexer.compressor"
    rows = [
        encode(kind, state[f"{path}.{leaf}.weight"]).decode()
        for kind, leaf in (("affine8-64", "wkv"), ("mxfp8", "wgate"))
    ]
    np.testing.assert_array_equal(mixed.decode(), np.concatenate(rows))
    assert given["embed"].bits == 4
    assert given["norm"].format == given["layers.0.ffn.gate"].format == "f32"


def test_logits_agree(shared: Path, want: np.ndarray, backend: str) -> None:
    got = ds4.load(shared, backend, cache="exact", context=128).logits(IDS)
    assert np.abs(got - want).max() <= GATE
    assert want.std() > 0.3


def test_logits_of_packed_weights_agree(
    shared: Path, want: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a GPU uses them; on a CPU a backend decodes when it loads."""
    monkeypatch.setattr(torch_ops, "upload", torch_weights.pack)
    monkeypatch.setattr(mlx_ops, "upload", lambda tensor, device: mlx_weights.pack(tensor))
    for backend, packed in (("torch", torch_weights.Packed), ("mlx", mlx_weights.Packed)):
        llm = ds4.load(shared, backend, cache="exact", context=128)
        weights = llm.runner.weights
        assert isinstance(weights.embed, packed)
        assert isinstance(weights.layers[0].ffn.experts.w2, packed)
        assert np.abs(llm.logits(IDS) - want).max() <= GATE


def test_general_entry_covers_modules_without_one(
    good: tuple[Tensors, dict[str, Any]], shared: Path, tmp_path: Path
) -> None:
    tensors, cfg = good[0], copy.deepcopy(good[1])
    del cfg["quantization"]["embed"]  # affine of 4 bits in groups of 64
    cfg["quantization"]["norm"] = False
    write_folder(tmp_path, cfg, tensors)
    found, want = loaded(tmp_path).given["embed"], loaded(shared).given["embed"]
    np.testing.assert_array_equal(found.decode(), want.decode())


# refusing

WQ_B, W1 = "layers.1.attn.wq_b", "layers.1.ffn.experts.w1"


def table(module: str, value: Any) -> Change:
    return lambda tensors, cfg: cfg["quantization"].update({module: value})


def put(name: str, dtype: str, *shape: int) -> Change:
    size = {"U32": 4, "BF16": 2, "F16": 2, "F32": 4, "U8": 1, "F8_E8M0": 1}[dtype]
    return lambda tensors, cfg: tensors.update(
        {name: (dtype, shape, bytes(size * int(np.prod(shape))))}
    )


def drop(name: str) -> Change:
    return lambda tensors, cfg: tensors.pop(name) and None


def poke(name: str, offset: int, data: bytes) -> Change:
    def change(tensors: Tensors, cfg: dict[str, Any]) -> None:
        dtype, shape, raw = tensors[name]
        tensors[name] = dtype, shape, raw[:offset] + data + raw[offset + len(data) :]

    return change


def entry_of(bits: int, group: int, mode: str = "affine") -> dict[str, Any]:
    return {"bits": bits, "group_size": group, "mode": mode}


MISFITS: list[tuple[str, Change, list[str]]] = [
    ("bits", table(WQ_B, entry_of(4, 64)), [WQ_B, "U32 [512, 32]", "affine of 4 bits"]),
    ("group", table(WQ_B, entry_of(8, 128)), [f"{WQ_B}.scales", "[512, 2]", "BF16 [512, 1]"]),
    ("mode", table(WQ_B, entry_of(8, 32, "mxfp8")), [f"{WQ_B}.biases", "no scale"]),
    ("no mxfp", table(W1, entry_of(4, 64, "mxfp4")), ["config.json", W1, "ds4 quantize"]),
    ("unknown mode", table(WQ_B, entry_of(4, 16, "nvfp4")), ["config.json", WQ_B, "groups"]),
    ("7 bits", table(WQ_B, entry_of(7, 64)), ["config.json", WQ_B, "should be mxfp4"]),
    ("odd entry", table(WQ_B, 8), ["config.json", WQ_B]),
    ("true bits", table(WQ_B, entry_of(True, 64)), ["config.json", WQ_B]),
    ("said not to be", table(WQ_B, False), [f"{WQ_B}.weight", "does not say"]),
    (
        "plain but said to be",
        put("layers.1.attn.wq_b.weight", "BF16", 512, 128),
        [f"{WQ_B}.scales", "BF16"],
    ),
    ("no entries", lambda t, cfg: cfg.pop("quantization") and None, ["U32", "does not say"]),
    ("a list", lambda t, cfg: cfg.update(quantization=[4]), ["quantization", "object"]),
    ("no scales", drop(f"{WQ_B}.scales"), [WQ_B, "scales [512, 2] is missing"]),
    ("no biases", drop(f"{W1}.biases"), ["experts.w1", "biases [128, 2] is missing"]),
    ("no weight", drop(f"{WQ_B}.weight"), [f"{WQ_B}.weight [512, 128] is missing"]),
    ("F16 scales", put(f"{WQ_B}.scales", "F16", 512, 2), [f"{WQ_B}.scales", "F16", "BF16"]),
    ("too few experts", put(f"{W1}.weight", "U32", 7, 128, 16), ["experts.7", "missing"]),
    ("flat experts", put(f"{W1}.weight", "U32", 1024, 16), [f"{W1}.weight", "[experts,"]),
    ("norm", put("norm.weight", "U32", 64), ["norm.weight", "U32", "BF16, F16 or F32"]),
    ("norm scales", put("norm.scales", "BF16", 4), ["norm.scales", "no scale"]),
    (
        "foreign",
        put("layers.0.attn.compressor.wkv.scales", "BF16", 4, 4),
        ["layers.0", "no place"],
    ),
    ("infinite", poke(f"{WQ_B}.scales", 6, b"\x80\x7f"), ["scales", "[1, 1]", "infinite"]),
    ("NaN bias", poke(f"{W1}.biases", 0, b"\xc0\xff"), ["w1.biases", "[0, 0]", "NaN"]),
    ("byte 255", poke("layers.1.attn.wq_a.scales", 3, b"\xff"), ["wq_a.scales", "byte 255"]),
    ("NaN code", poke("layers.1.attn.wq_a.weight", 3, b"\x7f"), ["wq_a.weight", "[0, 3]", "NaN"]),
]


@pytest.mark.parametrize(("change", "words"), [m[1:] for m in MISFITS], ids=[m[0] for m in MISFITS])
def test_misfit(
    tmp_path: Path, good: tuple[Tensors, dict[str, Any]], change: Change, words: list[str]
) -> None:
    tensors, cfg = dict(good[0]), copy.deepcopy(good[1])
    change(tensors, cfg)
    write_folder(tmp_path, cfg, tensors)
    message = refusal(tmp_path, cfg)
    for word in words:
        assert word in message


def test_plain_tensor_that_the_config_says_is_packed(
    tmp_path: Path, good: tuple[Tensors, dict[str, Any]]
) -> None:
    tensors = {n: t for n, t in good[0].items() if not n.startswith(f"{WQ_B}.")}
    put(f"{WQ_B}.weight", "BF16", 512, 128)(tensors, {})
    write_folder(tmp_path, good[1], tensors)
    assert "asks for U32 (affine of 8 bits in groups of 64)" in refusal(tmp_path, good[1])


def test_config_that_is_no_json(tmp_path: Path, good: tuple[Tensors, dict[str, Any]]) -> None:
    write_folder(tmp_path, good[1], good[0])
    (tmp_path / "config.json").write_text(json.dumps(good[1])[:-5])
    assert "config.json: is not valid JSON" in refusal(tmp_path, good[1])
