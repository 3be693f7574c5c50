"""The demo's shape, and a model of that shape with random weights."""

import math
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DeepseekV4Config, DeepseekV4ForCausalLM
from transformers.models.deepseek_v4 import modeling_deepseek_v4 as hf

OFFICIAL: dict[str, Any] = {
    "architectures": ["DeepseekV4ForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 0,
    "compress_ratios": [0, 0, 4, 32, 4, 32],
    "compress_rope_theta": 160000,
    "eos_token_id": 1,
    "expert_dtype": "fp4",
    "hc_eps": 1e-6,
    "hc_mult": 4,
    "hc_sinkhorn_iters": 20,
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 256,
    "index_head_dim": 128,
    "index_n_heads": 16,
    "index_topk": 32,
    "initializer_range": 0.02,
    "max_position_embeddings": 4096,
    "model_type": "deepseek_v4",
    "moe_intermediate_size": 128,
    "n_routed_experts": 16,
    "n_shared_experts": 1,
    "norm_topk_prob": True,
    "num_attention_heads": 4,
    "num_experts_per_tok": 4,
    "num_hash_layers": 3,
    "num_hidden_layers": 6,
    "num_key_value_heads": 1,
    "num_nextn_predict_layers": 0,
    "o_groups": 2,
    "o_lora_rank": 128,
    "q_lora_rank": 128,
    "qk_rope_head_dim": 64,
    "quantization_config": {
        "activation_scheme": "dynamic",
        "fmt": "e4m3",
        "quant_method": "fp8",
        "scale_fmt": "ue8m0",
        "weight_block_size": [128, 128],
    },
    "rms_norm_eps": 1e-6,
    "rope_scaling": {
        "beta_fast": 32,
        "beta_slow": 1,
        "factor": 4,
        "original_max_position_embeddings": 1024,
        "type": "yarn",
    },
    "rope_theta": 10000,
    "routed_scaling_factor": 1.5,
    "scoring_func": "sqrtsoftplus",
    "sliding_window": 64,
    "swiglu_limit": 10.0,
    "tie_word_embeddings": False,
    "topk_method": "noaux_tc",
    "torch_dtype": "bfloat16",
    "transformers_version": "4.57.1",
    "use_cache": True,
    "vocab_size": 4096,
}
_NOT_FOR_HF = ("architectures", "model_type", "quantization_config", "expert_dtype", "torch_dtype")


def hf_config(official: dict[str, Any]) -> DeepseekV4Config:
    """transformers' form of an official config: it writes 128 for HCA and the rate elsewhere."""
    fields = {k: v for k, v in official.items() if k not in (*_NOT_FOR_HF, "transformers_version")}
    ratios = fields["compress_ratios"]
    heavy = [ratio for ratio in ratios if ratio > 4]
    fields["compress_ratios"] = [128 if ratio > 4 else ratio for ratio in ratios]
    fields["compress_rate_hca"] = heavy[0] if heavy else 128
    return DeepseekV4Config(**fields, attn_implementation="eager")


@torch.no_grad()
def build(official: dict[str, Any], seed: int) -> DeepseekV4ForCausalLM:
    """A model with random weights."""
    torch.manual_seed(seed)
    config = hf_config(official)
    model = DeepseekV4ForCausalLM(config)
    streams = config.hc_mult
    for module in model.modules():
        if isinstance(module, hf.DeepseekV4HashRouter):
            module.tid2eid.copy_(_hash_routes(config))
        elif isinstance(module, hf.DeepseekV4HyperConnection):
            # streams begin nearly apart, and each layer reads their mean
            module.base[2 * streams :].view(streams, streams).fill_diagonal_(3)
            module.base[:streams].fill_(-math.log(streams - 1))
        elif isinstance(module, hf.DeepseekV4Indexer):
            nn.init.normal_(module.q_b_proj.weight, std=0.08)
            nn.init.normal_(module.scorer.weights_proj.weight, std=0.08)
    return model


def _hash_routes(config: DeepseekV4Config) -> Tensor:
    """Distinct random experts for each token, int64 (vocabulary, experts per token)."""
    scores = torch.rand(config.vocab_size, config.n_routed_experts)
    return scores.argsort(-1)[:, : config.num_experts_per_tok]
