"""The inputs on which kernels are tried: random, of the shapes of DeepSeek-V4-Flash."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import numpy as np

from ds4.config import Config
from ds4.plan.flash import flash

from .. import attention as plain_attention
from .. import compress as plain_compress
from .. import experts as plain_experts
from .. import hyper as plain_hyper
from .. import rows as plain_rows
from ..weights import Packed, Plain
from . import attention, experts, hyper, rows

ENTRIES = 1024  # compressed entries in the pool, of which some are chosen
EXPERTS = 8  # in the trial's stack: what an expert reads does not depend on their number


@dataclass(frozen=True)
class Trial:
    """A kernel beside its twin: both take `arguments` and return an array or several."""

    name: str
    kernel: Callable[..., Any]
    twin: Callable[..., Any]
    arguments: tuple[Any, ...]
    tolerance: float = 1e-4  # of the largest value
    share: float = 0.0  # of values that may differ by more: roundings of a last bit


def trials(cfg: Config | None = None, tokens: int = 1) -> Iterator[Trial]:
    """One for each kernel that serves the config."""
    cfg = cfg or flash()
    random = _Random()
    if hyper.serves(cfg):
        yield from _hyper(cfg, tokens, random)
    if rows.serves(cfg.head_dim, cfg.qk_rope_head_dim):
        yield from _rows(cfg, tokens, random)
    if attention.serves(cfg.head_dim, cfg.qk_rope_head_dim):
        yield _attend(cfg, tokens, random)
    yield from _experts(cfg, tokens, random)


class _Random:
    """Arrays from one seed; values near 1 in size."""

    def __init__(self) -> None:
        self.rng = np.random.default_rng(0)

    def __call__(self, *shape: int) -> mx.array:
        return mx.array(self.rng.standard_normal(shape, np.float32))

    def integers(self, below: int, *shape: int, dtype: Any = np.int32) -> mx.array:
        return mx.array(self.rng.integers(0, below, shape).astype(dtype))

    def turn(self, tokens: int, rotary: int) -> mx.array:
        angle = self.rng.uniform(0, 6, (tokens, rotary // 2))
        return mx.array(np.exp(1j * angle).astype(np.complex64))


def _hyper(cfg: Config, tokens: int, random: _Random) -> Iterator[Trial]:
    H, D = cfg.hc_mult, cfg.hidden_size
    h = random(tokens, H, D)
    mixes = SimpleNamespace(scale=random(3), base=random(2 * H + H * H))
    arguments = mixes, random(D), h, random(tokens, 2 * H + H * H), cfg
    yield Trial("hc_mix", hyper.mix, plain_hyper.mix, arguments)
    streams = random(tokens, D), h, random(tokens, H), random(tokens, H, H)
    yield Trial("hc_spread", hyper.spread, plain_hyper.spread, streams)


def _rows(cfg: Config, tokens: int, random: _Random) -> Iterator[Trial]:
    """A window's row, an indexer's query, and entries of both kinds of pool."""
    C, R, eps = cfg.head_dim, cfg.qk_rope_head_dim, cfg.rms_norm_eps
    width, heads, turn = cfg.index_head_dim, cfg.index_n_heads, random.turn(tokens, R)
    kv = random(tokens, C), random(C), turn, eps, "kv"
    yield Trial("row", rows.row, plain_rows.row, kv, share=0.01)
    query = random(tokens, heads, width), None, turn, eps, "index"
    yield Trial("row", rows.row, plain_rows.row, query, share=0.01)
    for channels, form, ratio, sides in (
        (C, "kv", 128, 1),
        (C, "kv", 4, 2),
        (width, "index", 4, 2),
    ):
        ring = random(300, 2 * sides * channels)
        numbers = random.integers(300, tokens, sides * ratio)
        numbers[0, : (sides - 1) * ratio] = -1  # a first block has none before it
        weights = random(ratio, sides * channels), random(channels), turn, eps, form
        pooled = ring, numbers, *weights
        yield Trial("entry", rows.entry, plain_compress.entry, pooled, share=0.01)


def _attend(cfg: Config, tokens: int, random: _Random) -> Trial:
    C, W = cfg.head_dim, cfg.sliding_window
    near = random.integers(W, tokens, W)
    far = random.integers(ENTRIES, tokens, cfg.index_topk)
    arguments = (
        random(tokens, cfg.num_attention_heads, C),
        random(cfg.num_attention_heads),
        random.turn(tokens, cfg.qk_rope_head_dim),
        random(2 * W, C).astype(mx.bfloat16),
        near,
        random(ENTRIES, C).astype(mx.bfloat16),
        far,
        cfg.rms_norm_eps,
    )
    return Trial("attend", attention.attend, plain_attention.attend_rows, arguments)


def _experts(cfg: Config, tokens: int, random: _Random) -> Iterator[Trial]:
    D, E, k = cfg.hidden_size, cfg.n_routed_experts, cfg.num_experts_per_tok
    inner, limit = cfg.moe_intermediate_size, cfg.swiglu_limit
    if experts.routes(E, k):
        arguments = random(tokens, E), random(E), k, cfg.routed_scaling_factor
        yield Trial("route", experts.route, plain_experts.biased, arguments)
    count = min(E, EXPERTS)
    words = random.integers(2**32, count, 2 * inner, D // 8, dtype=np.uint32)
    scales = random.integers(8, count, 2 * inner, D // 32, dtype=np.uint8) + 118
    stack = Packed("mxfp4", 4, 32, words, scales)
    if experts.gates(stack):
        few = random(tokens, D), stack, random.integers(count, tokens, k), limit
        yield Trial("gate_up", experts.gate_up, plain_experts.gated, few)
    wide = Plain(random(cfg.vocab_size // 256 * 8, D).astype(mx.bfloat16))
    if experts.multiplies(wide):
        yield Trial("matvec", experts.matvec, plain_experts.product, (random(tokens, D), wide))
