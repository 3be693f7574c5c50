"""Bytes and operations of a model, counted tensor by tensor from its config.

Sources: shapes, specification 2.2; cache rows, 4.1; floating-point operations, 5.3.
"""

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Literal

import numpy as np

from ..backend import CacheMode
from ..config import Config
from ..config_fields import CSA_RATIO
from ..quant.formats import FP8_BLOCK
from ..quant.recipes import MXFP8, Recipe, class_of
from ..weights.export import storage_format
from ..weights.names import Drafter, Shape, expected, expected_drafter

CLASSES = {
    "gate_up": "experts, gate and up",
    "down": "experts, down",
    "dense": "attention and shared experts",
    "embed": "embedding",
    "head": "head",
    "compress": "compressors and indexer",
    "tables": "routing tables",
    "rest": "routers, hyper-connections, norms",
}
EXPERTS = "gate_up", "down"
# what ranks share out (docs/gpus.md)
BY_HEADS = ".attn.wq_b.weight", ".attn.wo_a.weight", ".attn.wo_b.weight"
_SHIPPED_BITS = {"mxfp4": 4.25, "bf16": 16, "f32": 32, "int": 64}
_PLAIN_GROUP = 64  # cache values that share one E8M0 scale
_INDEX_GROUP = 32
Kept = Literal["packed", "bf16", "float32"]
_KEPT_NATIVE: Mapping[str, Kept] = {"cuda": "packed", "mlx": "bf16"}


# weights


@dataclass(frozen=True)
class WeightSizes:
    """Bytes of a model's weights in one recipe."""

    by_class: Mapping[str, int]
    token: int  # bytes that one decoded token reads, batch 1
    token_experts: int  # of these, the routed experts

    @property
    def total(self) -> int:
        return sum(self.by_class.values())

    @property
    def experts(self) -> int:
        return sum(self.by_class[kind] for kind in EXPERTS)

    @property
    def others(self) -> int:
        return self.total - self.experts


@cache
def census(cfg: Config) -> Mapping[tuple[str, str, Shape], int]:
    """How many tensors there are of each (class, format as shipped, shape)."""
    counts: Counter[tuple[str, str, Shape]] = Counter()
    for name, shape in expected(cfg).items():
        kind = class_of(name) or ("tables" if name.endswith("tid2eid") else "rest")
        counts[kind, storage_format(name, cfg.expert_dtype), shape] += 1
    return counts


def parameters(cfg: Config) -> int:
    """Parameters of the main model; routing tables and scales are none."""
    return sum(n * math.prod(s) for (kind, _, s), n in census(cfg).items() if kind != "tables")


def weight_sizes(cfg: Config, recipe: Recipe | None = None) -> WeightSizes:
    """The bytes of a recipe, made from this model; None: of the model as shipped."""
    made = None if recipe is None else recipe.for_experts(cfg.expert_dtype)
    by_class = dict.fromkeys(CLASSES, 0)
    for (kind, shipped, shape), count in census(cfg).items():
        by_class[kind] += count * _nbytes(made, kind, shipped, shape)
    experts = sum(by_class[kind] for kind in EXPERTS)
    chosen = experts * cfg.num_experts_per_tok // cfg.n_routed_experts
    rows = (by_class["embed"] + by_class["tables"]) // cfg.vocab_size
    always = sum(by_class[kind] for kind in ("dense", "head", "compress", "rest"))
    return WeightSizes(by_class, always + chosen + rows, chosen)


def head_parts(cfg: Config, ranks: int) -> int:
    """Into how many parts so many ranks cut the matrices BY_HEADS."""
    return 1 if cfg.o_groups % ranks or cfg.num_attention_heads % ranks else ranks


def head_bytes(cfg: Config, recipe: Recipe) -> int:
    """Bytes of the matrices BY_HEADS in a recipe."""
    made = recipe.for_experts(cfg.expert_dtype)
    return sum(
        _nbytes(made, "dense", storage_format(name, cfg.expert_dtype), shape)
        for name, shape in expected(cfg).items()
        if name.endswith(BY_HEADS)
    )


def drafter_bytes(cfg: Config, kind: Drafter, recipe: Recipe | None = None) -> int:
    """Bytes of a drafter in a recipe, or as shipped (it reads the model's embedding and head)."""
    made = None if recipe is None else recipe.for_experts(cfg.expert_dtype)
    return sum(
        _nbytes(made, class_of(name) or "rest", storage_format(name, cfg.expert_dtype), shape)
        for name, shape in expected_drafter(cfg, kind).items()
    )


def _nbytes(recipe: Recipe | None, kind: str, shipped: str, shape: Shape) -> int:
    count = math.prod(shape)
    chosen = getattr(recipe, kind, None)
    if recipe is not None and shipped == "fp8":
        chosen = chosen or MXFP8  # which is how FP8 is kept
    chosen = None if chosen is None else chosen.fitting(shape[-1])
    if chosen is not None:
        return int(count * chosen.bits_per_weight / 8)
    if shipped == "fp8":
        return count + math.prod(-(-n // FP8_BLOCK) for n in shape)
    return int(count * _SHIPPED_BITS[shipped] / 8)


# cache


def kept_by(backend: str, mode: CacheMode = "native") -> Kept:
    """How a backend keeps rows of caches; MLX has no FP8 or FP4 that its operations could read."""
    if mode == "exact":
        return "float32"
    return _KEPT_NATIVE.get(backend, "float32")


def row_bytes(cfg: Config, kept: Kept = "packed") -> tuple[int, int]:
    """Bytes of a key-value row and of an index row; packed: FP8 and bf16 rotary, and FP4."""
    if kept != "packed":
        each = 2 if kept == "bf16" else 4
        return each * cfg.head_dim, each * cfg.index_head_dim
    plain, rotary = cfg.head_dim - cfg.qk_rope_head_dim, cfg.qk_rope_head_dim
    index = cfg.index_head_dim
    return plain + -(-plain // _PLAIN_GROUP) + 2 * rotary, index // 2 + -(-index // _INDEX_GROUP)


def cache_bytes(cfg: Config, context: int) -> int:
    """Bytes of one sequence's native cache (specification 4.2); compressor states left out."""
    kv, index = row_bytes(cfg)
    total = 0
    for ratio in cfg.compress_ratios:
        total += min(context, cfg.sliding_window) * kv
        if ratio:
            total += context // ratio * (kv + (index if ratio == CSA_RATIO else 0))
    return total


def cache_read_bytes(cfg: Config, context: int, kept: Kept = "packed") -> int:
    """Bytes of cache that one decoded token reads: windows, chosen rows, every index row."""
    kv, index = row_bytes(cfg, kept)
    total = 0
    for ratio in cfg.compress_ratios:
        total += min(context, cfg.sliding_window) * kv
        entries = context // ratio if ratio else 0
        if ratio == CSA_RATIO:
            total += min(entries, cfg.index_topk) * kv + entries * index
        else:
            total += entries * kv
    return total


def state_bytes(cfg: Config) -> int:
    """Bytes of the float32 states of open blocks, one sequence (specification 4.2)."""
    total = 0
    for ratio in cfg.compress_ratios:
        if ratio == CSA_RATIO:
            total += 2 * ratio * 2 * (cfg.head_dim + cfg.index_head_dim) * 2 * 4
        elif ratio:
            total += ratio * cfg.head_dim * 2 * 4
    return total


# operations


def prefill_flops(cfg: Config, tokens: int) -> float:
    """Floating-point operations a token, mean over a prompt of `tokens`; the head left out."""
    seen = np.arange(1, tokens + 1)
    attended, scored = np.zeros(tokens), np.zeros(tokens)
    for ratio in cfg.compress_ratios:
        rows = np.minimum(seen, cfg.sliding_window)
        entries = seen // ratio if ratio else 0
        if ratio == CSA_RATIO:
            scored += entries
            entries = np.minimum(entries, cfg.index_topk)
        attended += rows + entries
    attention = 4 * cfg.num_attention_heads * cfg.head_dim * attended.mean()
    index = cfg.index_n_heads * (2 * cfg.index_head_dim + 3) * scored.mean()
    return 2 * _active_parameters(cfg) + float(attention + index)


def _active_parameters(cfg: Config) -> int:
    """Parameters that multiply each token, without embedding and head."""
    total = 0
    for (kind, _, shape), count in census(cfg).items():
        size = count * math.prod(shape)
        if kind in EXPERTS:
            total += size * cfg.num_experts_per_tok // cfg.n_routed_experts
        elif kind not in ("embed", "head", "tables"):
            total += size
    return total
