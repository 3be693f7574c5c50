"""Checks a backend against the reference on a small random model, operation by operation.

A backend whose operations hand each other what only it can read (`fused`) is checked by its logits.
"""

import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from .backend import Backend, CacheMode, open_backend
from .config import Config
from .proxy import Mismatch, Pair, difference
from .runner import Runner
from .weights import load_weights
from .weights.synthetic import SyntheticCheckpoint

# Relative to the largest value. In native mode a difference in the last bit of a row may round it
# to the next FP4 or FP8 value, so that is only a check for gross mistakes.
TOLERANCE: dict[CacheMode, float] = {"exact": 1e-4, "native": 5e-2}
FUSED_TOLERANCE: dict[CacheMode, float] = {"exact": 1e-2, "native": 5e-2}  # fp16 activations


@dataclass(frozen=True)
class OpResult:
    """One operation: its largest relative error (None: it only stores; `attention` reads it)."""

    name: str
    cache: CacheMode
    error: float | None
    tolerance: float
    seconds: float  # in all, over the run
    ok: bool


def check_backend(be: Backend) -> list[OpResult]:
    """Run a small model of every layer kind on `be` and on the reference, in both cache modes.

    An operation that fails ends its run: what comes after it is missing.
    """
    check = _check_steps if getattr(be, "fused", False) else _check_mode
    return [result for mode in TOLERANCE for result in check(be, mode)]


def small_config() -> Config:
    """Every branch, at the smallest widths that FP8 blocks and native rows allow."""
    return Config.from_dict(
        {
            "model_type": "deepseek_v4",
            "vocab_size": 320,
            "hidden_size": 128,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "head_dim": 128,
            "qk_rope_head_dim": 64,
            "q_lora_rank": 128,
            "o_groups": 2,
            "o_lora_rank": 128,
            "sliding_window": 12,
            "compress_ratios": [0, 4, 8, 4],
            "index_n_heads": 16,
            "index_head_dim": 128,
            "index_topk": 5,
            "n_routed_experts": 8,
            "n_shared_experts": 1,
            "num_experts_per_tok": 3,
            "moe_intermediate_size": 128,
            "num_hash_layers": 2,
            "num_nextn_predict_layers": 0,
            "routed_scaling_factor": 1.5,
            "swiglu_limit": 10.0,
            "hc_mult": 4,
            "hc_sinkhorn_iters": 20,
            "hc_eps": 1e-6,
            "rms_norm_eps": 1e-6,
            "rope_theta": 10000.0,
            "compress_rope_theta": 160000.0,
            "rope_scaling": {
                "type": "yarn",
                "factor": 16,
                "original_max_position_embeddings": 65536,
                "beta_fast": 32,
                "beta_slow": 1,
            },
            "max_position_embeddings": 1048576,
            "scoring_func": "sqrtsoftplus",
            "topk_method": "noaux_tc",
            "norm_topk_prob": True,
            "hidden_act": "silu",
            "tie_word_embeddings": False,
            "attention_bias": False,
            "bos_token_id": 0,
            "eos_token_id": 1,
        },
        source="the model of the check",
    )


def _check_mode(be: Backend, mode: CacheMode) -> list[OpResult]:
    again = open_backend(be.name, be.device, mode)
    pair: Any = Pair(open_backend("reference", "cpu", mode), again, TOLERANCE[mode])
    failed = None
    try:
        _exercise(pair)
    except Mismatch as mismatch:
        failed = str(mismatch).partition(":")[0]
    return [
        OpResult(
            name, mode, pair.errors.get(name), TOLERANCE[mode], pair.seconds[name], name != failed
        )
        for name in pair.seconds
        if name not in ("alloc", "upload")
    ]


def _check_steps(be: Backend, mode: CacheMode) -> list[OpResult]:
    """Logits after each kind of step; a wrong one leaves out what comes after it."""
    found = []
    allowed, start = FUSED_TOLERANCE[mode], time.perf_counter()
    both = (
        _steps(x)
        for x in (open_backend("reference", "cpu", mode), open_backend(be.name, be.device, mode))
    )
    for (name, want), (_, got) in zip(*both, strict=True):
        error, now = difference(want, be.download(got)), time.perf_counter()
        found.append(OpResult(name, mode, error, allowed, now - start, error <= allowed))
        start = now
        if error > allowed:
            break
    return found


def _steps(be: Any) -> Iterator[tuple[str, Any]]:
    """Prefill with padding, chunks of two sequences, and decoding: each with its last logits."""
    cfg = small_config()
    weights = load_weights(be, cfg, SyntheticCheckpoint(cfg))
    runner = Runner(be, cfg, weights, context=256, slots=2, max_chunk=40)
    tokens = np.random.default_rng(0).integers(0, cfg.vocab_size, 200).tolist()
    yield "prefill", runner.run({0: tokens[:37]}, pad_to=40)
    yield "chunks", runner.run({0: tokens[37:60], 1: tokens[60:71]})
    for i in range(100, 112):
        runner.run({0: tokens[i : i + 1], 1: tokens[i + 50 : i + 51]}, pad_to=4)
    yield "decode", runner.run({0: tokens[-1:], 1: tokens[:1]}, pad_to=4)


def _exercise(pair: Any) -> None:
    """Every kind of step, penalties, and sampling."""
    *_, (_, logits) = _steps(pair)
    ids = pair.upload(np.array([[3, 7, -1], [-1, -1, 9]], np.int32))
    numbers = np.linspace(0.5, 2, 6, dtype=np.float32).reshape(2, 3)
    logits = pair.adjust(logits, ids, pair.upload(numbers), pair.upload(-numbers))
    for temperature, top_k, top_p, min_p, u in [(0, 0, 1, 0, 0.5), (1, 9, 0.9, 0.01, 0.3)]:
        floats = [pair.upload(np.full(2, x, np.float32)) for x in (temperature, top_p, min_p, u)]
        k = pair.upload(np.full(2, top_k, np.int32))
        pair.sample(logits, floats[0], k, *floats[1:])
