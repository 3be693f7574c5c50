"""Checkpoints: every dialect of names and dtypes gives the same weights, streamed."""

import math
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors import safe_open

from ds4.config import Config
from ds4.weights import Checkpoint, load_weights
from ds4.weights.names import expected
from tests.fixtures import (
    Tensors,
    drafter_state,
    flash_config,
    official_dtype,
    official_fixture,
    official_tensors,
    plain_fixture,
    random_official_state,
    small_config,
    write_folder,
)
from tests.loading import Keep, decode, loaded, raw_tensors, same


@pytest.fixture(scope="module")
def official(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("official")
    official_fixture(folder)
    return folder


@pytest.fixture(scope="module")
def tensors() -> Tensors:
    """The main model's tensors in that folder."""
    return official_tensors(random_official_state(small_config()))


# the official format


def test_every_weight_of_an_official_checkpoint_is_bit_exact(official: Path) -> None:
    cfg = Config.from_dict(small_config())
    raw = raw_tensors(official / "model.safetensors")
    with safe_open(official / "model.safetensors", "np") as file:  # the fixture itself is sound
        assert set(file.keys()) == set(raw)
    checkpoint = Checkpoint(official)
    formats = set()
    for name, shape in expected(cfg).items():
        tensor = checkpoint.read(name, shape)
        formats.add(tensor.format)
        assert tensor.shape == shape
        want = decode(name, raw)
        assert tensor.decode().tobytes() == np.ascontiguousarray(want).tobytes(), name
    assert formats == {"fp8", "mxfp4", "bf16", "f32", "int"}


def test_sizes_of_the_real_checkpoint() -> None:
    """Bytes of each kind of layer, from specification 2.2."""
    layers: dict[str, int] = {}
    for name, shape in expected(Config.from_dict(flash_config())).items():
        count, dtype = math.prod(shape), official_dtype(name, shape)
        blocks = math.prod(-(-n // 128) for n in shape)
        sizes = {"F32": 4 * count, "BF16": 2 * count, "I64": 8 * count}
        sizes |= {"F8_E4M3": count + blocks, "I8": count // 2 + count // 32}
        key = ".".join(name.split(".")[:2]) if name.startswith("layers.") else "rest"
        layers[key] = layers.get(key, 0) + sizes[dtype]
    assert layers["layers.0"] == layers["layers.1"] == 3_566_148_952
    assert layers["layers.2"] == 3_596_055_640
    assert layers["layers.4"] == layers["layers.42"] == 3_589_851_224
    assert layers["layers.3"] == layers["layers.41"] == 3_568_596_312
    mtp = 3_593_787_756
    assert sum(layers.values()) + mtp == 159_609_485_896


def test_the_tree_that_the_model_reads(official: Path) -> None:
    cfg, be = Config.from_dict(small_config()), Keep()
    w = load_weights(be, cfg, Checkpoint(official))
    raw = raw_tensors(official / "model.safetensors")
    weight = {name: decode(name, raw) for name in expected(cfg)}

    def get(name: str) -> np.ndarray:
        return be.given[name].decode()

    np.testing.assert_array_equal(get(w.embed), weight["embed.weight"])
    np.testing.assert_array_equal(get(w.hc_head.base), weight["hc_head_base"])
    assert [layer.attn.ratio for layer in w.layers] == [0, 0, 4, 8, 4, 8, 4]
    assert w.layers[0].attn.compressor is None
    assert w.layers[3].attn.indexer is None
    for hashed, layer in zip([True] * 3 + [False] * 4, w.layers, strict=True):
        assert (layer.ffn.gate.bias is None) == hashed
        assert (layer.ffn.gate.tid2eid is None) != hashed
    csa = w.layers[4]
    np.testing.assert_array_equal(get(csa.attn.freqs), cfg.rope_freqs(4))
    np.testing.assert_array_equal(get(csa.hc_ffn.fn), weight["layers.4.hc_ffn_fn"])
    for mine, theirs in (
        (csa.attn.compressor, "compressor"),
        (csa.attn.indexer.compressor, "indexer.compressor"),
    ):
        pair = [weight[f"layers.4.attn.{theirs}.{x}.weight"] for x in ("wkv", "wgate")]
        np.testing.assert_array_equal(get(mine.wkv_gate), np.concatenate(pair))
    wo_a = be.given[csa.attn.wo_a]
    assert (wo_a.format, wo_a.shape) == ("fp8", (2, 128, 256))
    np.testing.assert_array_equal(
        wo_a.decode().reshape(256, 256), weight["layers.4.attn.wo_a.weight"]
    )
    for matrix in ("w1", "w2", "w3"):
        name = getattr(csa.ffn.experts, matrix)
        assert name == f"layers.4.ffn.experts.{matrix}"
        each = [weight[f"layers.4.ffn.experts.{e}.{matrix}.weight"] for e in range(8)]
        np.testing.assert_array_equal(get(name), np.stack(each))
        assert be.given[name].format == "mxfp4"


def test_progress_counts_every_byte_once(official: Path) -> None:
    cfg = Config.from_dict(small_config())
    calls: list[tuple[int, int]] = []
    load_weights(Keep(), cfg, Checkpoint(official), lambda done, total: calls.append((done, total)))
    raw = raw_tensors(official / "model.safetensors")
    assert {total for _, total in calls} == {
        sum(data.nbytes for name, (_, data) in raw.items() if not name.startswith("mtp."))
    }
    assert [done for done, _ in calls] == sorted(done for done, _ in calls)
    assert calls[-1][0] == calls[-1][1]


# the same weights, stored otherwise


def test_sharded_is_single(tmp_path: Path, official: Path) -> None:
    official_fixture(tmp_path, shards=5)
    assert len(list(tmp_path.glob("*.safetensors"))) == 5
    same(loaded(official), loaded(tmp_path))
    (tmp_path / "model.safetensors.index.json").unlink()  # the files say what they hold
    same(loaded(official), loaded(tmp_path))


@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16"])
def test_plain_matrices_under_official_names(tmp_path: Path, dtype: str) -> None:
    cfg = plain_fixture(tmp_path, dtype=dtype)
    be, state = loaded(tmp_path).decoded(), random_official_state(cfg)
    cast = {"F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16}[dtype]
    for name in ("embed", "layers.5.attn.wq_a", "layers.5.ffn.shared_experts.w2"):
        want = state[f"{name}.weight"].astype(cast).astype(np.float32)
        np.testing.assert_array_equal(be[name], want)


@pytest.mark.parametrize(
    ("dtype", "other"), [("I8", "U8"), ("I8", "F4"), ("F8_E8M0", "U8"), ("I64", "I32")]
)
def test_other_names_of_the_same_dtypes(
    tmp_path: Path, official: Path, tensors: Tensors, dtype: str, other: str
) -> None:
    changed = dict(tensors)
    for name, (stored, shape, data) in tensors.items():
        if stored == dtype and other == "F4":
            changed[name] = ("F4", (shape[0], 2 * shape[1]), data)
        elif stored == dtype and other == "I32":
            changed[name] = ("I32", shape, np.frombuffer(data, np.int64).astype(np.int32).tobytes())
        elif stored == dtype:
            changed[name] = (other, shape, data)
    write_folder(tmp_path, small_config(), changed)
    same(loaded(official), loaded(tmp_path))


def test_fp8_experts(tmp_path: Path) -> None:
    """As in V4-Flash-Base."""
    cfg = small_config()
    state = random_official_state(cfg)
    renamed = {name.replace(".experts.", ".renamed."): x for name, x in state.items()}
    tensors = {n.replace(".renamed.", ".experts."): t for n, t in official_tensors(renamed).items()}
    write_folder(tmp_path, cfg, tensors)
    experts = loaded(tmp_path).given["layers.0.ffn.experts.w2"]
    assert (experts.format, experts.shape) == ("fp8", (8, 256, 128))
    each = [state[f"layers.0.ffn.experts.{e}.w2.weight"] for e in range(8)]
    np.testing.assert_allclose(experts.decode(), np.stack(each), rtol=0.07, atol=1e-3)


def test_fp8_groups_that_end_inside_a_block_are_decoded(tmp_path: Path) -> None:
    official_fixture(tmp_path, o_lora_rank=64)
    raw = raw_tensors(tmp_path / "model.safetensors")
    wo_a = loaded(tmp_path).given["layers.0.attn.wo_a"]
    assert (wo_a.format, wo_a.shape) == ("f32", (2, 64, 256))
    want = decode("layers.0.attn.wo_a.weight", raw)
    np.testing.assert_array_equal(wo_a.data.reshape(128, 256), want)


# what the main model leaves


def test_drafters_and_unknown_tensors_are_reported(
    tmp_path: Path, official: Path, tensors: Tensors
) -> None:
    cfg = small_config()
    write_folder(tmp_path / "bare", cfg, tensors)
    assert Checkpoint(tmp_path / "bare").extras == ()

    draft = official_tensors(drafter_state(cfg))
    write_folder(tmp_path / "mtp", cfg, tensors | draft)
    (extra,) = Checkpoint(tmp_path / "mtp").extras
    assert (extra.kind, extra.count) == ("mtp", len(draft))
    assert extra.nbytes == sum(len(data) for _, _, data in draft.values())

    block = {
        "mtp.0.main_proj.weight": ("BF16", (4, 4), bytes(32)),
        "mtp.2.markov_head.markov_w1.weight": ("BF16", (4, 4), bytes(32)),
    }
    stray = {"layers.0.self_attn.rotary_emb.inv_freq": ("F32", (4,), bytes(16))}
    write_folder(tmp_path / "dspark", cfg, tensors | block | stray)
    dspark, unknown = Checkpoint(tmp_path / "dspark").extras
    assert (dspark.kind, dspark.count, dspark.nbytes) == ("dspark", 2, 64)
    assert (unknown.kind, unknown.names, unknown.nbytes) == ("unknown", tuple(stray), 16)
    same(loaded(official), loaded(tmp_path / "dspark"))


def test_pickles_beside_safetensors_are_never_opened(tmp_path: Path) -> None:
    official_fixture(tmp_path)
    for name in ("pytorch_model.bin", "training_args.bin", "model.pt", "optimizer.pkl"):
        (tmp_path / name).write_bytes(b"not even a pickle")
        (tmp_path / name).chmod(0)
    assert Checkpoint(tmp_path).extras[0].kind == "mtp"
