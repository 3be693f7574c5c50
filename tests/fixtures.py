"""Random checkpoints in every dialect, small enough for a test, and the real model's config.json.

Values follow specification 8.1: nothing is left at a value that hides a mistake.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np

from ds4.config import Config
from ds4.quant.formats import encode_bf16, encode_fp8, encode_mxfp4
from ds4.weights.names import expected, expected_drafter
from ds4.weights.tensor import HostTensor

Tensors = dict[str, tuple[str, tuple[int, ...], bytes]]  # name -> dtype, shape, bytes


def flash_config() -> dict[str, Any]:
    """config.json of DeepSeek-V4-Flash, every field (specification 1.1)."""
    return {
        "architectures": ["DeepseekV4ForCausalLM"],
        "model_type": "deepseek_v4",
        "vocab_size": 129280,
        "hidden_size": 4096,
        "num_hidden_layers": 43,
        "num_nextn_predict_layers": 1,
        "num_hash_layers": 3,
        "moe_intermediate_size": 2048,
        "n_routed_experts": 256,
        "n_shared_experts": 1,
        "num_experts_per_tok": 6,
        "scoring_func": "sqrtsoftplus",
        "topk_method": "noaux_tc",
        "norm_topk_prob": True,
        "routed_scaling_factor": 1.5,
        "swiglu_limit": 10.0,
        "rope_theta": 10000,
        "compress_rope_theta": 160000,
        "attention_bias": False,
        "initializer_range": 0.02,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "torch_dtype": "bfloat16",
        "expert_dtype": "fp4",
        "num_attention_heads": 64,
        "num_key_value_heads": 1,
        "head_dim": 512,
        "qk_rope_head_dim": 64,
        "q_lora_rank": 1024,
        "o_groups": 8,
        "o_lora_rank": 1024,
        "sliding_window": 128,
        "index_n_heads": 64,
        "index_head_dim": 128,
        "index_topk": 512,
        "hc_mult": 4,
        "hc_sinkhorn_iters": 20,
        "hc_eps": 1e-6,
        "rms_norm_eps": 1e-6,
        "hidden_act": "silu",
        "max_position_embeddings": 1048576,
        "tie_word_embeddings": False,
        "attention_dropout": 0.0,
        "use_cache": True,
        "transformers_version": "4.57.1",
        "compress_ratios": [0, 0, *([4, 128] * 20), 4, 0],
        "rope_scaling": {
            "type": "yarn",
            "factor": 16,
            "original_max_position_embeddings": 65536,
            "beta_fast": 32,
            "beta_slow": 1,
        },
        "quantization_config": {
            "quant_method": "fp8",
            "fmt": "e4m3",
            "scale_fmt": "ue8m0",
            "weight_block_size": [128, 128],
            "activation_scheme": "dynamic",
        },
    }


def small_config(**overrides: Any) -> dict[str, Any]:
    """The real config scaled down, every kind of layer in it; FP8 blocks and FP4 groups fit."""
    return flash_config() | {
        "vocab_size": 512,
        "hidden_size": 256,
        "num_hidden_layers": 7,
        "compress_ratios": [0, 0, 4, 8, 4, 8, 4, 0],
        "moe_intermediate_size": 128,
        "n_routed_experts": 8,
        "num_experts_per_tok": 2,
        "num_attention_heads": 4,
        "head_dim": 128,
        "q_lora_rank": 128,
        "o_groups": 2,
        "o_lora_rank": 128,
        "sliding_window": 16,
        "index_n_heads": 16,
        "index_topk": 8,
        "max_position_embeddings": 4096,
        "rope_scaling": {
            "type": "yarn",
            "factor": 4,
            "original_max_position_embeddings": 64,
            "beta_fast": 32,
            "beta_slow": 1,
        },
        **overrides,
    }


# values


def random_official_state(cfg: dict[str, Any], seed: int = 0) -> dict[str, np.ndarray]:
    """Every tensor of the main model under its official name: float32, tid2eid int64."""
    config, rng = Config.from_dict(cfg), np.random.default_rng(seed)
    return {name: values(name, shape, config, rng) for name, shape in expected(config).items()}


def values(name: str, shape: tuple[int, ...], cfg: Config, rng: np.random.Generator) -> np.ndarray:
    if name.endswith("tid2eid"):
        order = rng.random((shape[0], cfg.n_routed_experts)).argsort(1)
        return np.ascontiguousarray(order[:, : shape[1]])
    normal = rng.standard_normal(shape, np.float32)
    if name.endswith("norm.weight"):
        return 1 + np.float32(0.3) * normal
    if name.endswith("_scale"):
        return rng.uniform(0.5, 1.5, shape).astype(np.float32)
    if name.endswith("gate.bias"):
        return np.float32(0.5) * normal
    if name.endswith(("attn_sink", "ape", "_base")):
        return normal
    return normal * np.float32(2 / np.sqrt(shape[-1]))


def drafter_state(cfg: dict[str, Any], seed: int = 1) -> dict[str, np.ndarray]:
    """An MTP block."""
    config, rng = Config.from_dict(cfg), np.random.default_rng(seed)
    shapes = expected_drafter(config, "mtp")
    return {name: values(name, shape, config, rng) for name, shape in shapes.items()}


# formats

_BF16 = ("embed.weight", "head.weight", "gate.weight", "weights_proj.weight", "norm.weight")


def official_dtype(name: str, shape: tuple[int, ...]) -> str:
    """The dtype of a tensor in the official release (specification 2.2)."""
    if name.endswith("tid2eid"):
        return "I64"
    if not name.endswith(".weight"):
        return "F32"
    if name.endswith(_BF16) or ".compressor." in name:
        return "BF16"
    return "I8" if ".experts." in name else "F8_E4M3"


def official_tensors(state: dict[str, np.ndarray]) -> Tensors:
    """Each tensor in its official dtype, scales beside it."""
    out: Tensors = {}
    for name, x in state.items():
        dtype = official_dtype(name, x.shape)
        if dtype in ("I8", "F8_E4M3"):
            codes, scales = encode_mxfp4(x) if dtype == "I8" else encode_fp8(x)
            out[name] = (dtype, codes.shape, codes.tobytes())
            scale = name.removesuffix("weight") + "scale"
            out[scale] = ("F8_E8M0", scales.shape, scales.tobytes())
        else:
            data = encode_bf16(x) if dtype == "BF16" else x
            out[name] = (dtype, x.shape, data.tobytes())
    return out


def plain_tensors(state: dict[str, np.ndarray], dtype: str = "F32") -> Tensors:
    """Each tensor as F32, F16 or BF16; routing tables as I64."""
    cast = {"F32": np.float32, "F16": np.float16}
    return {
        name: ("I64", x.shape, x.tobytes())
        if x.dtype == np.int64
        else (
            dtype,
            x.shape,
            (encode_bf16(x) if dtype == "BF16" else x.astype(cast[dtype])).tobytes(),
        )
        for name, x in state.items()
    }


# files


def write_safetensors(path: Path, tensors: Tensors) -> None:
    """A safetensors file, bytes in the order given."""
    header, end = {}, 0
    for name, (dtype, shape, data) in tensors.items():
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [end, end + len(data)]}
        end += len(data)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    body = b"".join(data for _, _, data in tensors.values())
    path.write_bytes(len(text).to_bytes(8, "little") + text + body)


def write_folder(folder: Path, cfg: dict[str, Any], tensors: Tensors, shards: int = 1) -> None:
    """config.json and one file, or several with an index."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(cfg))
    if shards == 1:
        write_safetensors(folder / "model.safetensors", tensors)
        return
    names, index = list(tensors), {}
    for i, part in enumerate(np.array_split(np.arange(len(names)), shards)):
        file = f"model-{i + 1:05}-of-{shards:05}.safetensors"
        chosen = {names[j]: tensors[names[j]] for j in part}
        write_safetensors(folder / file, chosen)
        index |= dict.fromkeys(chosen, file)
    total = sum(len(data) for _, _, data in tensors.values())
    text = json.dumps({"metadata": {"total_size": total}, "weight_map": index})
    (folder / "model.safetensors.index.json").write_text(text)


def official_fixture(
    folder: Path, seed: int = 0, shards: int = 1, **overrides: Any
) -> dict[str, Any]:
    """A random checkpoint with the official names, dtypes and scale shapes, and an MTP block;
    returns its config."""
    cfg = small_config(**overrides)
    state = random_official_state(cfg, seed) | drafter_state(cfg, seed + 1)
    write_folder(folder, cfg, official_tensors(state), shards)
    return cfg


def plain_fixture(
    folder: Path, seed: int = 0, dtype: str = "F32", shards: int = 1, **overrides: Any
) -> dict[str, Any]:
    """A random checkpoint with official names and nothing quantised; returns its config."""
    cfg = small_config(**overrides)
    write_folder(folder, cfg, plain_tensors(random_official_state(cfg, seed), dtype), shards)
    return cfg


def hard_weights() -> tuple[HostTensor, HostTensor]:
    """Every FP8 and every FP4 code, with scales from very small to very large."""
    rng = np.random.default_rng(0)
    codes = rng.permutation(256).astype(np.uint8).repeat(256).reshape(256, 256).T.copy()
    codes[(codes & 127) == 127] = 0
    fp8 = HostTensor("fp8", codes, np.array([[1, 127], [150, 200]], np.uint8))
    pairs = rng.permutation(256).astype(np.uint8).repeat(8).reshape(16, 128)
    mxfp4 = HostTensor("mxfp4", pairs, rng.integers(1, 220, (16, 8), np.uint8))
    return fp8, mxfp4
