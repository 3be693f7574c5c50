"""DeepSeek-V4 put together from mlx-lm's layers as they come: what the MLX backend is compared to.

mlx-lm 0.32 has DeepSeek-V4.1, whose hyper-connections, router, experts, sparse attention and caches
are V4's but for their wiring; this wires them as V4, in cache mode exact. It is the naive way: a
module a matrix, a cache that grows by concatenation, indices and masks made for each layer.

    pip install --no-deps mlx-lm
"""

from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.models import deepseek_v41 as v41
from mlx_lm.models.rope_utils import YarnRoPE
from mlx_lm.models.switch_layers import SwitchLinear

from ds4.config import Config
from ds4.weights import load_weights
from ds4.weights.load import Source


class _Decoded:
    """Loads every weight as float32, or as the integers they are."""

    def load(self, name: str, tensor: Any) -> mx.array:
        return mx.array(tensor.decode().astype(np.int32 if tensor.format == "int" else np.float32))


def _set(module: nn.Module, **arrays: mx.array) -> Any:
    module.update(arrays)
    return module


def _linear(weight: mx.array) -> nn.Linear:
    return _set(nn.Linear(1, 1, bias=False), weight=weight)


def _norm(weight: mx.array, eps: float) -> nn.RMSNorm:
    return _set(nn.RMSNorm(1, eps=eps), weight=weight)


def _switch(weight: mx.array) -> SwitchLinear:
    return _set(SwitchLinear(1, 1, 1, bias=False), weight=weight)


class Naive:
    """The model with one sequence; `run` appends tokens and returns the last logits."""

    def __init__(self, cfg: Config, source: Source) -> None:
        w = load_weights(_Decoded(), cfg, source)
        known = v41.ModelArgs.__dataclass_fields__.keys() - {"rope_scaling"}
        args = v41.ModelArgs(**{name: x for name, x in vars(cfg).items() if name in known})
        self.cfg, self.w = cfg, w
        self.norm, self.head = _norm(w.norm, cfg.rms_norm_eps), _linear(w.head)
        self.layers = [_Layer(cfg, args, i, layer) for i, layer in enumerate(w.layers)]
        self.reset()

    def reset(self) -> None:
        self.start = 0
        for layer in self.layers:
            layer.cache = v41.LayerCache(self.cfg.sliding_window)
            layer.index_cache = v41.LayerCache(self.cfg.sliding_window)

    def run(self, ids: list[int]) -> mx.array:
        cfg, tokens = self.cfg, mx.array([ids])
        h = mx.repeat(self.w.embed[tokens][:, :, None], cfg.hc_mult, 2)
        for layer in self.layers:
            h = layer(h, tokens, self.start)
        self.start += len(ids)
        h, head = h[:, -1:], self.w.hc_head
        flat = mx.fast.rms_norm(h.reshape(1, 1, -1), None, cfg.rms_norm_eps)
        pre = mx.sigmoid((flat @ head.fn.T) * head.scale + head.base) + cfg.hc_eps
        return self.head(self.norm(v41._collapse(h, pre)))[0]


class _Layer:
    def __init__(self, cfg: Config, args: v41.ModelArgs, number: int, w: SimpleNamespace) -> None:
        eps, a, f = cfg.rms_norm_eps, w.attn, w.ffn
        self.cfg, self.ratio, self.hashed = cfg, a.ratio, f.gate.tid2eid
        self.attn_hc = _set(v41.HyperConnection(args), **vars(w.hc_attn))
        self.ffn_hc = _set(v41.HyperConnection(args), **vars(w.hc_ffn))
        self.attn_norm, self.ffn_norm = _norm(w.attn_norm, eps), _norm(w.ffn_norm, eps)
        self.q_a, self.q_norm, self.q_b = _linear(a.wq_a), _norm(a.q_norm, eps), _linear(a.wq_b)
        self.kv, self.kv_norm, self.sinks = _linear(a.wkv), _norm(a.kv_norm, eps), a.attn_sink
        self.o_a, self.o_b = _switch(a.wo_a), _linear(a.wo_b)
        self.groups = mx.arange(cfg.o_groups)[None]
        self.rope = _rope(cfg, a.ratio)
        self.compressor = _Compressor(cfg, a.compressor, a.ratio) if a.ratio else None
        if a.indexer:
            self.index_q, self.index_w = _linear(a.indexer.wq_b), _linear(a.indexer.weights_proj)
            self.index_keys = _Compressor(cfg, a.indexer.compressor, a.ratio)
        self.router = _set(v41.Router(args), weight=f.gate.weight)
        if f.gate.bias is not None:
            _set(self.router, e_score_correction_bias=f.gate.bias)
        self.experts, s = v41.Experts(args), f.shared_experts
        switch = self.experts.switch_mlp
        for name, weight in (("gate", f.experts.w1), ("up", f.experts.w3), ("down", f.experts.w2)):
            _set(getattr(switch, f"{name}_proj"), weight=weight)
        self.shared = v41.SharedMLP(args)
        for name, weight in (("gate", s.w1), ("up", s.w3), ("down", s.w2)):
            _set(getattr(self.shared, f"{name}_proj"), weight=weight)
        self.cache = self.index_cache = v41.LayerCache(cfg.sliding_window)

    def __call__(self, h: mx.array, tokens: mx.array, start: int) -> mx.array:
        pre, post, comb = self.attn_hc(h)
        x = self.attention(self.attn_norm(v41._collapse(h, pre)), start)
        h = v41._expand(x, h, post, comb)
        pre, post, comb = self.ffn_hc(h)
        x = self.feed_forward(self.ffn_norm(v41._collapse(h, pre)), tokens)
        return v41._expand(x, h, post, comb)

    def attention(self, x: mx.array, start: int) -> mx.array:
        cfg, length = self.cfg, x.shape[1]
        rotary = cfg.qk_rope_head_dim
        residual = self.q_norm(self.q_a(x))
        q = self.q_b(residual).reshape(1, length, cfg.num_attention_heads, cfg.head_dim)
        q = mx.fast.rms_norm(q, None, cfg.rms_norm_eps)
        q = v41._apply_rope(q, self.rope, rope_dim=rotary, offset=start)
        kv = self.kv_norm(self.kv(x))
        kv = v41._apply_rope(kv, self.rope, rope_dim=rotary, offset=start)
        previous = 0 if self.cache.window is None else self.cache.window.shape[1]
        window = cfg.sliding_window
        indices = [v41._window_indices(previous=previous, length=length, window=window)[None]]
        kvs = [self.cache.update_window(kv)]
        if self.compressor is not None:
            entries = self.compressor(x, start, self.cache, self.rope)
            if entries is not None:
                kvs.append(entries)
                indices.append(self.choose(x, residual, entries.shape[1], start))
            elif self.ratio == 4:
                self.index_keys(x, start, self.index_cache, self.rope)
        o = v41._sparse_attention(q, kvs, indices, sinks=self.sinks, scale=cfg.head_dim**-0.5)
        o = v41._apply_rope(o, self.rope, rope_dim=rotary, offset=start, inverse=True)
        o = self.o_a(o.reshape(length, cfg.o_groups, 1, -1), self.groups)
        return self.o_b(o.reshape(1, length, -1))

    def choose(self, x: mx.array, residual: mx.array, entries: int, start: int) -> mx.array:
        """(1, L, k): all visible entries, or the best by the indexer."""
        cfg, length = self.cfg, x.shape[1]
        seen = ((start + 1 + mx.arange(length)) // self.ratio)[:, None]
        if self.ratio != 4:
            every = mx.broadcast_to(mx.arange(entries), (length, entries))
            return mx.where(every < seen, every, -1)[None]
        heads, width = cfg.index_n_heads, cfg.index_head_dim
        keys: Any = self.index_keys(x, start, self.index_cache, self.rope)
        q = self.index_q(residual).reshape(1, length, heads, width)
        q = v41._apply_rope(q, self.rope, rope_dim=cfg.qk_rope_head_dim, offset=start)
        weights = self.index_w(x) * (width * heads) ** -0.5
        scores = mx.maximum(mx.matmul(q, keys[:, None].swapaxes(-1, -2)), 0.0)
        scores = mx.sum(scores * weights[..., None], axis=2)
        scores = mx.where((mx.arange(entries)[None] < seen)[None], scores, -mx.inf)
        k = min(cfg.index_topk, entries)
        chosen = mx.argpartition(-scores, k - 1, axis=-1)[..., :k].astype(mx.int32)
        return mx.where(chosen < seen[None], chosen, -1)

    def feed_forward(self, x: mx.array, tokens: mx.array) -> mx.array:
        flat = x.reshape(-1, x.shape[-1])
        ids, weights = self.router(flat)
        if self.hashed is not None:
            ids = self.hashed[tokens[0]]
            scores = mx.sqrt(nn.softplus(flat @ self.router.weight.T))
            weights = mx.take_along_axis(scores, ids, axis=-1)
            weights = weights / (mx.sum(weights, axis=-1, keepdims=True) + 1e-20)
            weights = weights * self.cfg.routed_scaling_factor
        return (self.experts(flat, ids, weights) + self.shared(flat)).reshape(x.shape)


class _Compressor:
    """Blocks of rows pooled into entries; at ratio 4 a block also sees the one before it."""

    def __init__(self, cfg: Config, w: SimpleNamespace, ratio: int) -> None:
        self.cfg, self.ratio, self.w = cfg, ratio, w
        self.proj, self.norm = _linear(w.wkv_gate), _norm(w.norm, cfg.rms_norm_eps)
        self.width = w.norm.size

    def __call__(
        self, x: mx.array, start: int, cache: v41.LayerCache, rope: YarnRoPE
    ) -> mx.array | None:
        """All entries so far, (1, E, width), or None."""
        ratio, overlaps = self.ratio, self.ratio == 4
        rows = v41._append(cache.pending_kv, self.proj(x))
        first = start + x.shape[1] - rows.shape[1]  # position of the first pending row
        lead = ratio if overlaps and first >= 0 and cache.pending_gate is not None else 0
        done = (rows.shape[1] - lead) // ratio
        if done:
            kv, gate = mx.split(rows[:, : lead + done * ratio], 2, axis=-1)
            kv, gate = (a.reshape(1, -1, ratio, a.shape[-1]) for a in (kv, gate))
            gate = gate + self.w.ape
            if overlaps:
                kv, gate = self.overlap(kv, 0.0, lead), self.overlap(gate, -mx.inf, lead)
            entry = self.norm(mx.sum(kv * mx.softmax(gate, axis=2), axis=2))
            block = (first + lead) // ratio
            entry = v41._apply_rope(
                entry, rope, rope_dim=self.cfg.qk_rope_head_dim, offset=block, scale=ratio
            )
            cache.compress_kv = v41._append(cache.compress_kv, entry)
            keep = rows.shape[1] - (lead + done * ratio) + (ratio if overlaps else 0)
            rows, cache.pending_gate = rows[:, rows.shape[1] - keep :], mx.array(1)
        cache.pending_kv = rows
        return cache.compress_kv

    def overlap(self, x: mx.array, nothing: float, lead: int) -> mx.array:
        """(1, B, 4, 2 C) -> (1, B - lead / 4, 8, C)"""
        width = self.width
        before, own = x[:, :, :, :width], x[:, :, :, width:]
        if lead:
            return mx.concatenate([before[:, :-1], own[:, 1:]], axis=2)
        none = mx.full((1, 1, 4, width), nothing)
        return mx.concatenate([mx.concatenate([none, before[:, :-1]], axis=1), own], axis=2)


def _rope(cfg: Config, ratio: int) -> YarnRoPE:
    base = cfg.compress_rope_theta if ratio else cfg.rope_theta
    if not ratio or cfg.rope_scaling is None:
        return YarnRoPE(dims=cfg.qk_rope_head_dim, traditional=True, base=base)
    return YarnRoPE(
        dims=cfg.qk_rope_head_dim,
        traditional=True,
        base=base,
        scaling_factor=cfg.rope_scaling.factor,
        original_max_position_embeddings=cfg.rope_scaling.original_max_position_embeddings,
        beta_fast=cfg.rope_scaling.beta_fast,
        beta_slow=cfg.rope_scaling.beta_slow,
        mscale=0.0,
        mscale_all_dim=0.0,
    )
