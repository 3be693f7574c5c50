"""Reading config.json: types, ranges, and relations between fields (specification 1).

Two dialects are read: DeepSeek's, and the one that transformers' save_pretrained writes
(layer_types, mlp_layer_types, rope_parameters). Keys that nobody here asks for are ignored.
"""

from collections.abc import Mapping
from typing import Any

from .errors import ConfigError
from .json_fields import LARGEST, Fields, short

CSA_RATIO = 4

# What every DeepSeek-V4 has in common: the forward pass is written for these values only.
_FIXED: dict[str, Any] = {
    "scoring_func": "sqrtsoftplus",
    "topk_method": "noaux_tc",
    "norm_topk_prob": True,
    "n_shared_experts": 1,
    "num_key_value_heads": 1,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "attention_bias": False,
    "mlp_bias": False,
}
_QUANTIZATION: dict[str, Any] = {
    "quant_method": "fp8",
    "fmt": "e4m3",
    "scale_fmt": "ue8m0",
    "weight_block_size": [128, 128],
}
_EXPERT_DTYPES = ("fp4", "fp8", "bf16", "bfloat16", "float16", "float32")
_MOST = {"num_hidden_layers": 512, "n_routed_experts": 2048}  # names are made for all of them
_COUNTS = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "head_dim",
    "q_lora_rank",
    "o_lora_rank",
    "o_groups",
    "sliding_window",
    "n_routed_experts",
    "num_experts_per_tok",
    "n_shared_experts",
    "moe_intermediate_size",
    "hc_mult",
    "hc_sinkhorn_iters",
    "max_position_embeddings",
)
_NUMBERS = ("routed_scaling_factor", "swiglu_limit", "hc_eps", "rms_norm_eps")
_INDEXER = ("index_n_heads", "index_head_dim", "index_topk")
_LAYER_TYPES = ("sliding_attention", "compressed_sparse_attention", "heavily_compressed_attention")
_MLP_LAYER_TYPES = ("hash_moe", "moe")


def read_fields(d: Any, source: str) -> dict[str, Any]:
    """A parsed config.json -> Config's fields; rope_scaling is a dict or None."""
    if not isinstance(d, Mapping):
        raise ConfigError(f"{source}: should hold a JSON object, not {short(d)}")
    f = Fields(d, source)
    _check_kind(f)
    out: dict[str, Any] = {name: f.integer(name, 1, _MOST.get(name, LARGEST)) for name in _COUNTS}
    out |= {name: f.number(name) for name in _NUMBERS}
    layers, vocab = out["num_hidden_layers"], out["vocab_size"]
    out["num_nextn_predict_layers"] = f.optional_integer("num_nextn_predict_layers")
    out["compress_ratios"] = _ratios(f, layers, out["num_nextn_predict_layers"])
    out["num_hash_layers"] = _hash_layers(f, layers)
    indexer = f.integer if CSA_RATIO in out["compress_ratios"] else f.optional_integer
    out |= {name: indexer(name) for name in _INDEXER}
    out["qk_rope_head_dim"] = _rope_dim(f, out["head_dim"])
    out |= _rope(f)
    out |= {name: f.integer(name, 0, vocab - 1) for name in ("bos_token_id", "eos_token_id")}
    out["expert_dtype"] = _expert_dtype(f)
    out["dspark"] = _dspark(f, layers, vocab)
    _check_relations(f, out)
    return out


def _check_kind(f: Fields) -> None:
    if f.get("model_type") != "deepseek_v4":
        f.fail("model_type", '"deepseek_v4" (V4.1, V3 and other models are not supported)')
    f.fixed(_FIXED)
    if f.get("quantization_config") is not None:
        f.inside("quantization_config").fixed(_QUANTIZATION)


def _check_relations(f: Fields, out: dict[str, Any]) -> None:
    width, rope = out["num_attention_heads"] * out["head_dim"], out["qk_rope_head_dim"]
    if width % out["o_groups"]:
        f.fail("o_groups", f"a divisor of num_attention_heads x head_dim ({width})")
    if out["num_experts_per_tok"] > out["n_routed_experts"]:
        f.fail("num_experts_per_tok", f"at most n_routed_experts ({out['n_routed_experts']})")
    if CSA_RATIO in out["compress_ratios"] and out["index_head_dim"] < rope:
        f.fail("index_head_dim", f"at least qk_rope_head_dim ({rope})")


def _dspark(f: Fields, layers: int, vocab: int) -> dict[str, Any]:
    """Only checkpoints with that drafter say something; which they are, their tensors tell."""
    listed = f.get("dspark_target_layer_ids")
    taps = list(range(max(0, layers - 3), layers)) if listed is None else listed
    whole = isinstance(taps, list) and all(isinstance(x, int) and 0 <= x < layers for x in taps)
    if not whole or not taps:
        f.refuse("dspark_target_layer_ids", listed, f"a list of layers below {layers}")
    return {
        "block_size": f.optional_integer("dspark_block_size") or 5,
        "markov_rank": f.optional_integer("dspark_markov_rank") or 256,
        "noise_token": f.optional_integer("dspark_noise_token_id") or min(128_799, vocab - 1),
        "target_layers": tuple(taps),
    }


def _expert_dtype(f: Fields) -> str:
    """Informative: the tensors decide. Early downloads lack it; all of those were FP4."""
    inner = f.get("quantization_config") or {}
    value = f.get("expert_dtype") or inner.get("expert_dtype") or "fp4"
    if value not in _EXPERT_DTYPES:
        f.refuse("expert_dtype", value, "one of " + ", ".join(_EXPERT_DTYPES))
    return str(value)


# layer kinds


def _ratios(f: Fields, layers: int, drafters: int) -> tuple[int, ...]:
    """The actual compress ratio of each main layer."""
    csa, hca = _rate(f, "csa", _LAYER_TYPES[1]), _rate(f, "hca", _LAYER_TYPES[2])
    kinds = f.types("layer_types", layers, _LAYER_TYPES)
    rate_of = dict(zip(_LAYER_TYPES, (0, csa or CSA_RATIO, hca or 128), strict=True))
    derived = None if kinds is None else tuple(rate_of[kind] for kind in kinds)
    if f.get("compress_ratios") is None and derived is not None:
        return derived
    listed = f.get("compress_ratios")
    if not isinstance(listed, list | tuple):
        f.fail("compress_ratios", f"a list of {layers} integers, one a layer")
    _check_ratios(f, listed, layers, drafters)
    # beside transformers' rates, 4 and 128 name the kind of a layer
    ratios = tuple(hca if r == 128 and hca else r for r in listed[:layers])
    if derived not in (None, ratios):
        f.fail("compress_ratios", f"{short(derived)}, to agree with layer_types")
    return ratios


def _rate(f: Fields, short: str, kind: str) -> int | None:
    """transformers' rate of one kind of layer, from either of its two places."""
    rates = None if f.get("compress_rates") is None else f.inside("compress_rates")
    if f.get(f"compress_rate_{short}") is not None:
        rate = f.integer(f"compress_rate_{short}")
        if rates:
            rates.agree(kind, rate, f"compress_rate_{short}")
    elif rates and rates.get(kind) is not None:
        rate = rates.integer(kind)
    else:
        return None
    if (rate == CSA_RATIO) != (short == "csa"):
        need = "4: CSA layers pool 4 tokens" if short == "csa" else "another number than 4"
        f.refuse(f"compress_rate_{short}", rate, need)
    return rate


def _check_ratios(f: Fields, listed: Any, layers: int, drafters: int) -> None:
    for i, ratio in enumerate(listed):
        if isinstance(ratio, bool) or not isinstance(ratio, int) or not 0 <= ratio <= LARGEST:
            f.refuse(f"compress_ratios[{i}]", ratio, "0, 4 or an integer above 4")
        if 0 < ratio < CSA_RATIO:
            need = "0, 4 or an integer above 4 (V4.1 models are not supported)"
            f.refuse(f"compress_ratios[{i}]", ratio, need)
    # one more for the MTP block; three more for the DSpark stages of the 0731 release
    lengths = sorted({layers, layers + 1, layers + 3, layers + drafters})
    if len(listed) not in lengths:
        allowed = " or ".join(map(str, lengths))
        raise ConfigError(
            f"{f.source}: compress_ratios has {len(listed)} entries, which contradicts "
            f"num_hidden_layers {layers}; it should have {allowed}"
        )
    for i, ratio in enumerate(listed[layers:], layers):
        if ratio:
            f.refuse(f"compress_ratios[{i}]", ratio, f"0: it is past the {layers} main layers")


def _hash_layers(f: Fields, layers: int) -> int:
    kinds = f.types("mlp_layer_types", layers, _MLP_LAYER_TYPES)
    if kinds is None:
        return f.integer("num_hash_layers", 0, layers)
    count = kinds.count("hash_moe")
    if "hash_moe" in kinds[count:]:
        f.fail("mlp_layer_types", "every hash_moe layer first")
    f.agree("num_hash_layers", count, "mlp_layer_types")
    return count


# rotary embedding


def _rope_dim(f: Fields, head_dim: int) -> int:
    share = f.get("partial_rotary_factor")
    if share is None or f.get("qk_rope_head_dim") is not None:
        rope = f.integer("qk_rope_head_dim", 2, head_dim)
    else:
        rope = int(head_dim * f.number("partial_rotary_factor"))
    if rope % 2 or not 2 <= rope <= head_dim:
        f.refuse("qk_rope_head_dim", rope, f"an even integer from 2 to head_dim ({head_dim})")
    return rope


def _rope(f: Fields) -> dict[str, Any]:
    """rope_theta, compress_rope_theta and rope_scaling."""
    outer = None if f.get("rope_parameters") is None else f.inside("rope_parameters")
    if outer is None or not {"main", "compress"} & set(outer.values):
        main = compress = f
        yarn = _yarn(f, "rope_scaling" if outer is None else "rope_parameters")
    else:
        main, compress = outer.inside("main"), outer.inside("compress")
        main.fixed({"rope_type": "default"})
        f.agree("rope_theta", main.get("rope_theta"), "rope_parameters: main")
        f.agree("compress_rope_theta", compress.get("rope_theta"), "rope_parameters: compress")
        yarn = _yarn(outer, "compress")
        if f.get("rope_scaling") is not None and _yarn(f, "rope_scaling") != yarn:
            f.fail("rope_scaling", "the same as rope_parameters: compress")
    return {
        "rope_theta": main.number("rope_theta", 1),
        "compress_rope_theta": compress.number(
            "compress_rope_theta" if compress is f else "rope_theta", 1
        ),
        "rope_scaling": yarn,
    }


def _yarn(f: Fields, name: str) -> dict[str, Any] | None:
    """The fields of Yarn, or None for no scaling."""
    if name in f.values and f.values[name] is None:
        return None
    if name not in f.values:
        f.fail(name, "a YaRN object, or null for no scaling")
    scaling = f.inside(name)
    kind = scaling.get("rope_type") or scaling.get("type")
    if kind == "default":
        return None
    if kind != "yarn":
        scaling.refuse("type", kind, '"yarn"')
    scaling.fixed({"attention_factor": 1.0, "truncate": True})
    turns = {
        "beta_fast": scaling.number("beta_fast") if "beta_fast" in scaling.values else 32.0,
        "beta_slow": scaling.number("beta_slow") if "beta_slow" in scaling.values else 1.0,
    }
    if turns["beta_fast"] <= turns["beta_slow"]:
        scaling.fail("beta_fast", f"above beta_slow ({turns['beta_slow']:g})")
    length = scaling.integer("original_max_position_embeddings")
    return {
        "factor": scaling.number("factor"),
        "original_max_position_embeddings": length,
        **turns,
    }
