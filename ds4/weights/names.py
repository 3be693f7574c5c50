"""Names and shapes of a checkpoint's tensors, and other software's names for them.

Official names and shapes: specification 2.2. Names of transformers and of its save_pretrained: 2.4.
"""

import re
from collections.abc import Iterator
from typing import Literal

from ..config import Config
from ..config_fields import CSA_RATIO

Shape = tuple[int, ...]
Drafter = Literal["mtp", "dspark"]

DSPARK_STAGES = 3

PACKED_LEAVES = (".scales", ".biases")  # beside a weight of the shared format

_GLOBAL = {
    "embed_tokens.weight": "embed.weight",
    "lm_head.weight": "head.weight",
    "norm.weight": "norm.weight",
    "hc_head.hc_fn": "hc_head_fn",
    "hc_head.hc_base": "hc_head_base",
    "hc_head.hc_scale": "hc_head_scale",
}
_PARAMETERS = {
    "attn_hc.fn": "hc_attn_fn",
    "attn_hc.base": "hc_attn_base",
    "attn_hc.scale": "hc_attn_scale",
    "ffn_hc.fn": "hc_ffn_fn",
    "ffn_hc.base": "hc_ffn_base",
    "ffn_hc.scale": "hc_ffn_scale",
    "self_attn.sinks": "attn.attn_sink",
    "self_attn.compressor.position_bias": "attn.compressor.ape",
    "self_attn.compressor.indexer.position_bias": "attn.indexer.compressor.ape",
    "mlp.gate.e_score_correction_bias": "ffn.gate.bias",
    "mlp.gate.tid2eid": "ffn.gate.tid2eid",
}
_MODULES = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_a_proj": "attn.wq_a",
    "self_attn.q_a_norm": "attn.q_norm",
    "self_attn.q_b_proj": "attn.wq_b",
    "self_attn.kv_proj": "attn.wkv",
    "self_attn.kv_norm": "attn.kv_norm",
    "self_attn.o_a_proj": "attn.wo_a",
    "self_attn.o_b_proj": "attn.wo_b",
    "self_attn.compressor.kv_proj": "attn.compressor.wkv",
    "self_attn.compressor.gate_proj": "attn.compressor.wgate",
    "self_attn.compressor.kv_norm": "attn.compressor.norm",
    "self_attn.compressor.indexer.kv_proj": "attn.indexer.compressor.wkv",
    "self_attn.compressor.indexer.gate_proj": "attn.indexer.compressor.wgate",
    "self_attn.compressor.indexer.kv_norm": "attn.indexer.compressor.norm",
    "self_attn.compressor.indexer.q_b_proj": "attn.indexer.wq_b",
    "self_attn.compressor.indexer.scorer.weights_proj": "attn.indexer.weights_proj",
    "mlp.gate": "ffn.gate",
    "mlp.shared_experts.gate_proj": "ffn.shared_experts.w1",
    "mlp.shared_experts.up_proj": "ffn.shared_experts.w3",
    "mlp.shared_experts.down_proj": "ffn.shared_experts.w2",
}
_EXPERT = {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}
_SAVED = {"attn.norm": "attn.kv_norm"}  # what save_pretrained makes of the official name

_LAYER = re.compile(r"layers\.(\d+)\.(.+)")
_HF_EXPERT = re.compile(r"mlp\.experts\.(\d+)\.(gate_proj|up_proj|down_proj)\.(.+)")
_OFFICIAL_EXPERT = re.compile(r"ffn\.experts\.\d+\.w[123]\.(weight|scale)")
_SHARED_EXPERTS = re.compile(
    r"((?:layers|mtp)\.\d+)\.ffn\.experts\.(w[123])\.(weight|scales|biases)"
)
_STACKED = re.compile(
    r"(?:model\.)?(layers\.\d+)\.(?:mlp|ffn)\.experts\.(gate_up_proj|down_proj)"
    r"(|\.weight|\.scale|_scale_inv|\.weight_scale_inv)"
)


# official <-> transformers


def to_official(name: str) -> str:
    """The official name of a tensor, from that name or transformers'; else the name itself."""
    name = name.removeprefix("model.")
    if name.endswith(".weight_scale_inv"):
        name = name.removesuffix(".weight_scale_inv") + ".scale"
    if name in _GLOBAL:
        return _GLOBAL[name]
    layer = _LAYER.fullmatch(name)
    if not layer:
        return name
    return f"layers.{layer[1]}.{_official_part(layer[2])}"


def _official_part(part: str) -> str:
    if part in _PARAMETERS:
        return _PARAMETERS[part]
    expert = _HF_EXPERT.fullmatch(part)
    if expert:
        return f"ffn.experts.{expert[1]}.{_EXPERT[expert[2]]}.{expert[3]}"
    module, dot, leaf = part.rpartition(".")
    return f"{_MODULES.get(module) or _SAVED.get(module) or module}{dot}{leaf}"


def stacked_experts(name: str) -> tuple[str, tuple[str, ...], str] | None:
    """Stacked experts -> ("layers.3", matrices, "weight" or another leaf); None for others.

    transformers' gate_up_proj [E, 2I, D] holds w1 in its first I rows and w3 in the rest, its
    down_proj is w2. The shared format stacks w1, w2 and w3 each.
    """
    shared = _SHARED_EXPERTS.fullmatch(name)
    if shared:
        return shared[1], (shared[2],), shared[3]
    match = _STACKED.fullmatch(name)
    if not match:
        return None
    matrices = ("w1", "w3") if match[2] == "gate_up_proj" else ("w2",)
    return match[1], matrices, "scale" if "scale" in match[3] else "weight"


def to_hf(name: str) -> str:
    """transformers' name for an official one; routed experts one by one, not stacked."""
    if name == "head.weight":
        return "lm_head.weight"
    module, _, leaf = name.rpartition(".")
    if leaf == "scale":
        return to_hf(f"{module}.weight") + "_scale_inv"
    for hf, official in _GLOBAL.items():
        if name == official:
            return f"model.{hf}"
    layer = _LAYER.fullmatch(name)
    return name if layer is None else f"model.layers.{layer[1]}.{_hf_part(layer[2])}"


def _hf_part(part: str) -> str:
    parameters = {official: hf for hf, official in _PARAMETERS.items()}
    if part in parameters:
        return parameters[part]
    module, _, leaf = part.rpartition(".")
    if _OFFICIAL_EXPERT.fullmatch(part):
        expert, w = module.split(".")[2:]
        proj = {official: hf for hf, official in _EXPERT.items()}[w]
        return f"mlp.experts.{expert}.{proj}.{leaf}"
    modules = {official: hf for hf, official in _MODULES.items()}
    return f"{modules.get(module, module)}.{leaf}"


# what belongs to a model


def recognised(name: str) -> bool:
    """Whether an official name is one of a main model's tensors, of whatever size."""
    for leaf in PACKED_LEAVES:
        if name.endswith(leaf):
            name = name.removesuffix(leaf) + ".weight"
    if name in _GLOBAL.values():
        return True
    layer = _LAYER.fullmatch(name)
    if layer is None:
        return False
    module, _, leaf = layer[2].rpartition(".")
    return (
        layer[2] in _PARAMETERS.values()
        or (leaf in ("weight", "scale") and module in _MODULES.values())
        or _OFFICIAL_EXPERT.fullmatch(layer[2]) is not None
    )


def is_matrix(name: str, shape: Shape) -> bool:
    """Whether a tensor may be stored as FP8 or FP4: a matrix that multiplies activations."""
    return name.endswith(".weight") and len(shape) == 2 and name != "embed.weight"


def expected(cfg: Config) -> dict[str, Shape]:
    """Every tensor of the main model, scales left out: official name -> logical shape."""
    d, n = cfg.hidden_size, cfg.hc_mult
    shapes: dict[str, Shape] = {
        "embed.weight": (cfg.vocab_size, d),
        "head.weight": (cfg.vocab_size, d),
        "norm.weight": (d,),
        "hc_head_fn": (n, n * d),
        "hc_head_base": (n,),
        "hc_head_scale": (1,),
    }
    for layer, ratio in enumerate(cfg.compress_ratios):
        parts = _layer(cfg, ratio, layer < cfg.num_hash_layers)
        shapes |= {f"layers.{layer}.{name}": shape for name, shape in parts}
    return shapes


def expected_drafter(cfg: Config, kind: Drafter) -> dict[str, Shape]:
    """The same of a drafter: every tensor under "mtp." (specification 2.2, Appendix A)."""
    d, n, rank = cfg.hidden_size, cfg.hc_mult, cfg.dspark.markov_rank
    stages = 1 if kind == "mtp" else DSPARK_STAGES
    last = f"mtp.{stages - 1}"
    shapes: dict[str, Shape] = {
        f"{last}.norm.weight": (d,),
        f"{last}.hc_head_fn": (n, n * d),
        f"{last}.hc_head_base": (n,),
        f"{last}.hc_head_scale": (1,),
    }
    if kind == "mtp":
        shapes |= {f"mtp.0.{x}_proj.weight": (d, d) for x in "eh"}
        shapes |= {f"mtp.0.{x}norm.weight": (d,) for x in "eh"}
    else:
        taps = len(cfg.dspark.target_layers)
        shapes |= {
            "mtp.0.main_proj.weight": (d, taps * d),
            "mtp.0.main_norm.weight": (d,),
            f"{last}.markov_head.markov_w1.weight": (cfg.vocab_size, rank),
            f"{last}.markov_head.markov_w2.weight": (cfg.vocab_size, rank),
            f"{last}.confidence_head.proj.weight": (1, d + rank),
        }
    for stage in range(stages):
        shapes |= {f"mtp.{stage}.{name}": shape for name, shape in _layer(cfg, 0, False)}
    return shapes


def _layer(cfg: Config, ratio: int, hashed: bool) -> Iterator[tuple[str, Shape]]:
    d, n = cfg.hidden_size, cfg.hc_mult
    for part in ("attn", "ffn"):
        yield f"hc_{part}_fn", ((2 + n) * n, n * d)
        yield f"hc_{part}_base", ((2 + n) * n,)
        yield f"hc_{part}_scale", (3,)
        yield f"{part}_norm.weight", (d,)
    yield from _attention(cfg)
    if ratio:
        yield from _compressor(cfg, "attn.compressor", cfg.head_dim, ratio)
    if ratio == CSA_RATIO:
        heads = cfg.index_n_heads
        yield "attn.indexer.wq_b.weight", (heads * cfg.index_head_dim, cfg.q_lora_rank)
        yield "attn.indexer.weights_proj.weight", (heads, d)
        yield from _compressor(cfg, "attn.indexer.compressor", cfg.index_head_dim, ratio)
    yield from _feed_forward(cfg, hashed)


def _attention(cfg: Config) -> Iterator[tuple[str, Shape]]:
    d, heads, width = cfg.hidden_size, cfg.num_attention_heads, cfg.head_dim
    low = cfg.o_groups * cfg.o_lora_rank
    yield "attn.attn_sink", (heads,)
    yield "attn.wq_a.weight", (cfg.q_lora_rank, d)
    yield "attn.q_norm.weight", (cfg.q_lora_rank,)
    yield "attn.wq_b.weight", (heads * width, cfg.q_lora_rank)
    yield "attn.wkv.weight", (width, d)
    yield "attn.kv_norm.weight", (width,)
    yield "attn.wo_a.weight", (low, heads * width // cfg.o_groups)
    yield "attn.wo_b.weight", (d, low)


def _compressor(cfg: Config, name: str, width: int, ratio: int) -> Iterator[tuple[str, Shape]]:
    # CSA blocks overlap: one half of the channels for the next block, one for its own
    channels = 2 * width if ratio == CSA_RATIO else width
    yield f"{name}.wkv.weight", (channels, cfg.hidden_size)
    yield f"{name}.wgate.weight", (channels, cfg.hidden_size)
    yield f"{name}.ape", (ratio, channels)
    yield f"{name}.norm.weight", (width,)


def _feed_forward(cfg: Config, hashed: bool) -> Iterator[tuple[str, Shape]]:
    d, wide, experts = cfg.hidden_size, cfg.moe_intermediate_size, cfg.n_routed_experts
    yield "ffn.gate.weight", (experts, d)
    if hashed:
        yield "ffn.gate.tid2eid", (cfg.vocab_size, cfg.num_experts_per_tok)
    else:
        yield "ffn.gate.bias", (experts,)
    for expert in ("shared_experts", *(f"experts.{e}" for e in range(experts))):
        yield f"ffn.{expert}.w1.weight", (wide, d)
        yield f"ffn.{expert}.w2.weight", (d, wide)
        yield f"ffn.{expert}.w3.weight", (wide, d)
