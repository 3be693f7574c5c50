"""The exporter: official names, dtypes, shapes and bytes, readable by others and by ourselves."""

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from ds4.config import Config
from ds4.quant import formats
from ds4.weights import export
from ds4.weights.checkpoint import Checkpoint
from ds4.weights.names import expected, to_hf
from ds4.weights.tensor import HostTensor

CONFIG = {
    "attention_bias": False, "bos_token_id": 0, "eos_token_id": 1, "expert_dtype": "fp4",
    "compress_ratios": [0, 4, 32], "compress_rope_theta": 160000, "rope_theta": 10000,
    "hc_eps": 1e-6, "hc_mult": 2, "hc_sinkhorn_iters": 3, "head_dim": 128, "hidden_act": "silu",
    "hidden_size": 160, "index_head_dim": 128, "index_n_heads": 2, "index_topk": 4,
    "max_position_embeddings": 512, "model_type": "deepseek_v4", "moe_intermediate_size": 64,
    "n_routed_experts": 3, "n_shared_experts": 1, "norm_topk_prob": True, "num_hash_layers": 1,
    "num_attention_heads": 2, "num_experts_per_tok": 2, "num_hidden_layers": 3,
    "num_key_value_heads": 1, "num_nextn_predict_layers": 0, "o_groups": 2, "o_lora_rank": 32,
    "q_lora_rank": 64, "qk_rope_head_dim": 64, "rms_norm_eps": 1e-6, "rope_scaling": None,
    "routed_scaling_factor": 1.5, "scoring_func": "sqrtsoftplus", "sliding_window": 16,
    "swiglu_limit": 10.0, "tie_word_embeddings": False, "topk_method": "noaux_tc",
    "vocab_size": 96,
}  # fmt: skip
CFG = Config.from_dict(CONFIG)

# specification 2.2: the stored dtype of each kind of weight
DTYPES = {
    "embed.weight": "BF16",
    "head.weight": "BF16",
    "norm.weight": "BF16",
    "hc_head_fn": "F32",
    "hc_head_base": "F32",
    "hc_head_scale": "F32",
    "hc_attn_fn": "F32",
    "hc_ffn_base": "F32",
    "hc_attn_scale": "F32",
    "attn_norm.weight": "BF16",
    "attn.attn_sink": "F32",
    "attn.wq_a.weight": "F8_E4M3",
    "attn.q_norm.weight": "BF16",
    "attn.wq_b.weight": "F8_E4M3",
    "attn.wkv.weight": "F8_E4M3",
    "attn.wo_a.weight": "F8_E4M3",
    "attn.wo_b.weight": "F8_E4M3",
    "attn.compressor.wkv.weight": "BF16",
    "attn.compressor.wgate.weight": "BF16",
    "attn.compressor.ape": "F32",
    "attn.compressor.norm.weight": "BF16",
    "attn.indexer.wq_b.weight": "F8_E4M3",
    "attn.indexer.weights_proj.weight": "BF16",
    "attn.indexer.compressor.wkv.weight": "BF16",
    "attn.indexer.compressor.ape": "F32",
    "ffn.gate.weight": "BF16",
    "ffn.gate.bias": "F32",
    "ffn.gate.tid2eid": "I64",
    "ffn.shared_experts.w2.weight": "F8_E4M3",
    "ffn.experts.1.w1.weight": "I8",
    "ffn.experts.1.w2.weight": "I8",
}


@pytest.fixture(scope="module")
def state() -> dict[str, np.ndarray]:
    """Random values under official names."""
    random = np.random.default_rng(0)
    made = {}
    for name, shape in expected(CFG).items():
        if name.endswith("tid2eid"):
            made[name] = random.integers(0, CFG.n_routed_experts, shape)
        else:
            made[name] = random.standard_normal(shape).astype(np.float32)
    return made


def write(folder: Path, state: dict[str, np.ndarray], **options: int) -> list[Path]:
    return export.write_checkpoint(folder, export.quantize_official(CONFIG, state), **options)


def header(path: Path) -> dict[str, dict]:
    data = path.read_bytes()
    size = int.from_bytes(data[:8], "little")
    entries = json.loads(data[8 : 8 + size])
    assert 8 + size + max(e["data_offsets"][1] for e in entries.values()) == len(data)
    return entries


def test_official_dtypes_and_shapes(tmp_path: Path, state: dict[str, np.ndarray]) -> None:
    entries = header(write(tmp_path, state)[0])
    found = {name: entry["dtype"] for name, entry in entries.items()}
    for kind, dtype in DTYPES.items():
        names = [n for n in found if n.removeprefix("layers.").lstrip("012.") == kind]
        assert names, kind
        assert {found[name] for name in names} == {dtype}, kind
    assert entries["layers.1.ffn.experts.0.w1.weight"]["shape"] == [64, 80]
    assert entries["layers.1.ffn.experts.0.w1.scale"]["shape"] == [64, 5]
    assert entries["layers.1.attn.wq_b.scale"]["shape"] == [2, 1]
    assert entries["layers.1.attn.wq_a.scale"]["shape"] == [1, 2]
    scales = {name for name, dtype in found.items() if dtype == "F8_E8M0"}
    scaled = {name for name, dtype in found.items() if dtype in ("I8", "F8_E4M3")}
    assert scales == {name.removesuffix("weight") + "scale" for name in scaled}
    assert set(found) - scales == set(expected(CFG))


def test_data_lies_in_the_official_order(tmp_path: Path, state: dict[str, np.ndarray]) -> None:
    entries = header(write(tmp_path, state)[0])
    order = sorted(entries, key=lambda name: entries[name]["data_offsets"])
    dtypes = [entries[name]["dtype"] for name in order]
    assert list(dict.fromkeys(dtypes)) == ["I64", "F32", "BF16", "F8_E8M0", "F8_E4M3", "I8"]
    packed = [name for name in order if entries[name]["dtype"] == "I8"]
    assert packed == sorted(packed)


def test_our_loader_reads_the_same_values(tmp_path: Path, state: dict[str, np.ndarray]) -> None:
    write(tmp_path, state)
    checkpoint = Checkpoint(tmp_path)
    checkpoint.check(CFG)
    for name, values in state.items():
        read = checkpoint.read(name, values.shape)
        again = export.encode(values, export.storage_format(name))
        assert read.format == again.format
        np.testing.assert_array_equal(read.decode(), again.decode())


def test_safetensors_reads_the_file(tmp_path: Path, state: dict[str, np.ndarray]) -> None:
    from safetensors import safe_open

    path = write(tmp_path, state)[0]
    with safe_open(path, "np") as file:
        assert set(file.keys()) == set(header(path))
        np.testing.assert_array_equal(
            file.get_tensor("layers.0.ffn.gate.tid2eid"), state["layers.0.ffn.gate.tid2eid"]
        )


def test_values_are_those_of_formats(state: dict[str, np.ndarray]) -> None:
    tensors = dict(export.quantize_official(CONFIG, state))
    name = "layers.2.ffn.experts.2.w3.weight"
    codes, scales = formats.encode_mxfp4(state[name])
    np.testing.assert_array_equal(tensors[name].data, codes)
    np.testing.assert_array_equal(tensors[name].scales, scales)


@pytest.mark.parametrize(("dtype", "stored"), [("fp8", "fp8"), ("bfloat16", "bf16")])
def test_experts_of_other_dtypes(dtype: str, stored: str) -> None:
    assert export.storage_format("layers.0.ffn.experts.0.w1.weight", dtype) == stored
    assert export.storage_format("layers.0.ffn.shared_experts.w1.weight", dtype) == "fp8"


def test_mtp_weights() -> None:
    assert export.storage_format("mtp.0.e_proj.weight") == "fp8"
    assert export.storage_format("mtp.0.enorm.weight") == "bf16"
    assert export.storage_format("mtp.0.hc_head_fn") == "f32"
    assert export.storage_format("mtp.0.ffn.experts.7.w2.weight") == "mxfp4"


def test_shards_and_index(tmp_path: Path, state: dict[str, np.ndarray]) -> None:
    *shards, index = write(tmp_path, state, shard_bytes=100_000)
    assert len(shards) > 2
    content = json.loads(index.read_text())
    sizes = 0
    for shard in shards:
        entries = header(shard)
        assert all(content["weight_map"][name] == shard.name for name in entries)
        sizes += sum(e["data_offsets"][1] - e["data_offsets"][0] for e in entries.values())
    assert content["metadata"]["total_size"] == sizes
    assert Checkpoint(tmp_path).check(CFG) == sizes


def test_one_file_replaces_shards(tmp_path: Path, state: dict[str, np.ndarray]) -> None:
    write(tmp_path, state, shard_bytes=100_000)
    write(tmp_path, state)
    assert [path.name for path in tmp_path.iterdir()] == [export.SINGLE_FILE]
    write(tmp_path, state, shard_bytes=100_000)
    assert not (tmp_path / export.SINGLE_FILE).exists()
    Checkpoint(tmp_path).check(CFG)


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    good = HostTensor("f32", np.ones(3, np.float32))
    path = export.write_checkpoint(tmp_path, [("hc_head_scale", good)])[0]
    before = path.read_bytes()

    def broken() -> Iterator[tuple[str, HostTensor]]:
        yield "hc_head_scale", good
        raise OSError("the source is gone")

    with pytest.raises(OSError, match="gone"):
        export.write_checkpoint(tmp_path, broken())
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def test_from_transformers(state: dict[str, np.ndarray]) -> None:
    """transformers' names, experts stacked, and back."""
    hf = {to_hf(name): values for name, values in state.items() if ".experts." not in name}
    for layer in range(CFG.num_hidden_layers):
        prefix = f"layers.{layer}.ffn.experts."
        w1, w2, w3 = (
            np.stack([state[f"{prefix}{e}.{w}.weight"] for e in range(CFG.n_routed_experts)])
            for w in ("w1", "w2", "w3")
        )
        hf[f"model.layers.{layer}.mlp.experts.gate_up_proj"] = np.concatenate([w1, w3], 1)
        hf[f"model.layers.{layer}.mlp.experts.down_proj"] = w2
    back = export.from_transformers(hf)
    assert back.keys() == state.keys()
    for name, values in state.items():
        np.testing.assert_array_equal(back[name], values)
