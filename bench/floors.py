"""The least time a step can take, and what the fastest other engines take.

decode    bytes that must be read / bandwidth
prefill   the larger of operations / speed of a large bf16 product and bytes / bandwidth
"""

from dataclasses import dataclass

from ds4.plan.sizes import cache_read_bytes, prefill_flops, weight_sizes

from .models import Model


@dataclass(frozen=True)
class Goal:
    """tokens/s to reach, and the best of the other engines: same shapes, an H100, 2026-11-23."""

    target: float | None = None
    share_of: float | None = None  # or this share of the speed at the shortest context
    peer: float | None = None
    engine: str = ""


_MXFP4 = {
    ("decode", 1): (160, 66.1, "llama.cpp MXFP4"),
    ("decode", 8): (440, 228, "llama.cpp MXFP4"),
    ("decode", 16): (530, 202, "llama.cpp MXFP4"),
    ("decode", 32): (670, 228, "llama.cpp MXFP4"),
    ("prefill", 512): (3500, 1056, "llama.cpp MXFP4"),
    ("prefill", 2048): (6000, 2062, "llama.cpp MXFP4"),
    ("prefill", 8192): (8000, 2096, "llama.cpp MXFP4"),
}
_TWO_BITS = {
    ("decode", 1): (200, 65.8, "llama.cpp IQ2_XXS"),
    ("decode", 8): (None, 245, "llama.cpp IQ2_XXS"),
    ("decode", 16): (None, 216, "llama.cpp IQ2_XXS"),
    ("prefill", 512): (None, 996, "antirez/ds4 q2"),
    ("prefill", 2048): (None, 2182, "ik_llama.cpp IQ2_XXS"),
    ("prefill", 8192): (None, 1323, "antirez/ds4 q2"),
}
_LONG = {32_768: 0.9, 131_072: 0.8}


def goal(model: Model, kind: str, batch: int, tokens: int) -> Goal:
    """Of the real model's shapes; of others there is none."""
    if model.synthetic.model != "flash":
        return Goal()
    if kind == "decode" and tokens in _LONG:
        return Goal(share_of=_LONG[tokens]) if batch == 1 else Goal()
    known = _TWO_BITS if model.synthetic.recipe.startswith("q2") else _MXFP4
    target, peer, engine = known.get(
        (kind, batch if kind == "decode" else tokens), (None, None, "")
    )
    return Goal(target, None, peer, engine)


def touched(model: Model, tokens: int) -> float:
    """Experts of a layer that so many tokens are expected to need, routed uniformly."""
    n, k = model.cfg.n_routed_experts, model.cfg.num_experts_per_tok
    return n * (1 - (1 - k / n) ** tokens)


def step_bytes(model: Model, tokens: int, slots: int, context: int, experts: float) -> float:
    """Bytes that a step of `tokens` reads: every weight it needs once, and its caches.

    `experts` of each layer are needed.
    """
    sizes = weight_sizes(model.cfg, model.source.recipe)
    rows = (sizes.by_class["embed"] + sizes.by_class["tables"]) / model.cfg.vocab_size
    always = sizes.token - sizes.token_experts - rows
    chosen = sizes.experts * experts / model.cfg.n_routed_experts
    return always + chosen + rows * tokens + slots * cache_read_bytes(model.cfg, context)


def prefill_operations(model: Model, tokens: int) -> float:
    """Operations for a whole prompt, with logits of its last token."""
    head = 2 * model.cfg.vocab_size * model.cfg.hidden_size
    return prefill_flops(model.cfg, tokens) * tokens + head
