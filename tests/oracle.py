"""transformers' DeepSeek-V4 with random weights that hide nothing: the oracle of these tests."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.numpy import save_file
from transformers import DeepseekV4Config, DeepseekV4ForCausalLM
from transformers.utils import logging

from ds4.config import Config
from ds4.weights import Checkpoint
from ds4.weights.export import from_transformers
from ds4.weights.names import expected, stacked_experts, to_official

logging.set_verbosity_error()

TINY: dict[str, Any] = {
    "vocab_size": 512,
    "hidden_size": 64,
    "moe_intermediate_size": 32,
    "num_attention_heads": 4,
    "head_dim": 32,
    "qk_rope_head_dim": 8,
    "q_lora_rank": 16,
    "o_groups": 2,
    "o_lora_rank": 8,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "sliding_window": 8,
    "index_n_heads": 16,  # fewer make exactly tied scores, which transformers breaks at random
    "index_head_dim": 16,
    "index_topk": 3,
    "compress_ratios": [0, 0, 4, 128, 4, 128, 4],
    "compress_rate_hca": 8,  # what 128 above stands for
    "num_hash_layers": 3,
    "max_position_embeddings": 4096,
    "swiglu_limit": 10.0,
    "rope_theta": 10000.0,
    "compress_rope_theta": 160000.0,
    "rope_scaling": {
        "type": "yarn",
        "factor": 4,
        "beta_fast": 32,
        "beta_slow": 1,
        "original_max_position_embeddings": 64,
    },
}

# Wider than it need be, and as wide as FP8 and FP4 blocks and native cache rows ask for.
BLOCKY: dict[str, Any] = {
    **TINY,
    "hidden_size": 128,
    "moe_intermediate_size": 64,
    "head_dim": 128,
    "qk_rope_head_dim": 64,
    "q_lora_rank": 32,
    "o_lora_rank": 32,
    "n_routed_experts": 6,
    "num_experts_per_tok": 3,
    "sliding_window": 13,
    "index_head_dim": 128,
    "index_topk": 5,
    "swiglu_limit": 1.5,  # low enough that it clamps
    "compress_rate_hca": 16,
    "num_hash_layers": 1,
    "compress_ratios": [0, 4, 128, 4],
}

# Odd sizes, no YaRN, no hash layers, no window-only layer.
ODD: dict[str, Any] = {
    **TINY,
    "vocab_size": 131,
    "hidden_size": 40,
    "moe_intermediate_size": 24,
    "num_attention_heads": 6,
    "head_dim": 20,
    "qk_rope_head_dim": 6,
    "q_lora_rank": 12,
    "o_groups": 3,
    "o_lora_rank": 5,
    "n_routed_experts": 5,
    "num_experts_per_tok": 4,
    "sliding_window": 5,
    "index_n_heads": 17,
    "index_topk": 100,
    "swiglu_limit": 1.0,
    "compress_rate_hca": 6,
    "num_hash_layers": 0,
    "compress_ratios": [4, 128, 4],
    "rope_scaling": None,
}


def make(shape: dict[str, Any], seed: int = 0) -> DeepseekV4ForCausalLM:
    """A model in float32 whose every parameter matters."""
    cfg = DeepseekV4Config(
        **{k: v for k, v in shape.items() if k != "compress_ratios"},
        compress_ratios=[*shape["compress_ratios"], 0],
        num_hidden_layers=len(shape["compress_ratios"]),
        attn_implementation="eager",
    )
    model = DeepseekV4ForCausalLM(cfg).eval()
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in [*model.named_parameters(), *model.named_buffers()]:
            if "inv_freq" not in name:
                p.copy_(_random(name, p, cfg, g))
    return model


def _random(name: str, p: torch.Tensor, cfg: Any, g: torch.Generator) -> torch.Tensor:
    if "tid2eid" in name:
        experts, picks = cfg.n_routed_experts, cfg.num_experts_per_tok
        return torch.stack([torch.randperm(experts, generator=g)[:picks] for _ in p])
    noise = torch.randn(p.shape, generator=g)
    if name.endswith("norm.weight") or "layernorm" in name:
        return 1 + 0.3 * noise
    if "sinks" in name or "position_bias" in name or name.endswith("base"):
        return noise
    if "correction_bias" in name:
        return 0.5 * noise
    if name.endswith("scale"):
        return 0.5 + torch.rand(p.shape, generator=g)
    return noise * 2 / math.sqrt(p.shape[-1])


def logits(model: DeepseekV4ForCausalLM, ids: Sequence[int]) -> NDArray[np.float32]:
    """(T, vocab) of a whole sequence at once, without a cache."""
    with torch.no_grad():
        return model(torch.tensor([list(ids)]), use_cache=False).logits[0].numpy()


def official_config(shape: dict[str, Any]) -> dict[str, Any]:
    """config.json in DeepSeek's form: actual ratios, and what transformers leaves out."""
    ratios = [shape["compress_rate_hca"] if r == 128 else r for r in shape["compress_ratios"]]
    return {
        "architectures": ["DeepseekV4ForCausalLM"],
        "model_type": "deepseek_v4",
        **{k: v for k, v in shape.items() if k != "compress_rate_hca"},
        "num_hidden_layers": len(ratios),
        "num_nextn_predict_layers": 1,
        "compress_ratios": [*ratios, 0],
        "num_key_value_heads": 1,
        "n_shared_experts": 1,
        "scoring_func": "sqrtsoftplus",
        "topk_method": "noaux_tc",
        "norm_topk_prob": True,
        "routed_scaling_factor": 1.5,
        "hc_mult": 4,
        "hc_sinkhorn_iters": 20,
        "hc_eps": 1e-6,
        "rms_norm_eps": 1e-6,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "attention_bias": False,
        "bos_token_id": 0,
        "eos_token_id": 1,
    }


def save(model: DeepseekV4ForCausalLM, shape: dict[str, Any], folder: Path) -> Path:
    """The model as an official checkpoint whose every tensor is F32."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(official_config(shape)))
    state = from_transformers({k: v.numpy() for k, v in model.state_dict().items()})
    save_file({k: np.ascontiguousarray(v) for k, v in state.items()}, folder / "model.safetensors")
    return folder


def from_checkpoint(folder: Path) -> DeepseekV4ForCausalLM:
    """transformers' model with the decoded weights of an official checkpoint."""
    cfg, checkpoint = Config.from_file(folder / "config.json"), Checkpoint(folder)
    model = DeepseekV4ForCausalLM(_hf_config(folder)).eval()
    shapes = expected(cfg)

    def read(name: str) -> NDArray[Any]:
        return checkpoint.read(name, shapes[name]).decode()

    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            stack = stacked_experts(name)
            if stack is None:
                values = read(to_official(name))
            else:
                layer, matrices, _ = stack
                path = f"{layer}.ffn.experts"
                each = range(cfg.n_routed_experts)
                rows = [np.stack([read(f"{path}.{e}.{m}.weight") for e in each]) for m in matrices]
                values = np.concatenate(rows, 1)
            tensor.copy_(torch.from_numpy(np.ascontiguousarray(values)))
    return model


def _hf_config(folder: Path) -> DeepseekV4Config:
    official = json.loads((folder / "config.json").read_text())
    ratios = official["compress_ratios"][: official["num_hidden_layers"]]
    heavy = {r for r in ratios if r not in (0, 4)}
    assert len(heavy) == 1
    left_out = ("architectures", "model_type", "quantization_config", "torch_dtype")
    return DeepseekV4Config(
        **{k: v for k, v in official.items() if k not in (*left_out, "compress_ratios")},
        compress_ratios=[128 if r in heavy else r for r in ratios] + [0],
        compress_rate_hca=heavy.pop(),
        attn_implementation="eager",
    )
