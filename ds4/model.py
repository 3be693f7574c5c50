"""DeepSeek-V4, written once for every backend.

This file imports no array library: `be` does the arithmetic, and the code below only says what
feeds what. Weight names are the checkpoint's own; shapes stand in backend.py.
"""

from collections.abc import Callable

from .backend import Array, Backend, Weights
from .cache import LayerCache
from .config import Config
from .step import Step

Watch = Callable[[int, Array], None]  # what a drafter sees: a layer's number and its streams


def forward(
    be: Backend,
    cfg: Config,
    w: Weights,
    cache: list[LayerCache],
    step: Step,
    watch: Watch | None = None,
) -> Array:
    """Run one step, update the cache, and return logits for the rows in step.last."""
    h = be.embed(w.embed, step.tokens, cfg.hc_mult)
    for number, (layer, c) in enumerate(zip(w.layers, cache, strict=True)):
        h = block(be, cfg, layer, c, step, h)
        if watch:
            watch(number, h)
    x = be.hc_head(w.hc_head, be.take(h, step.last), cfg)
    return be.linear(w.head, be.rms_norm(w.norm, x, cfg.rms_norm_eps))


def block(be: Backend, cfg: Config, w: Weights, c: LayerCache, step: Step, h: Array) -> Array:
    """One layer: attention, then experts, each between hyper-connections."""
    x, mix = be.hc_pre(w.hc_attn, w.attn_norm, h, cfg)
    h = be.hc_post(attention(be, cfg, w.attn, c, step, x), h, mix)
    x, mix = be.hc_pre(w.hc_ffn, w.ffn_norm, h, cfg)
    return be.hc_post(moe(be, cfg, w.ffn, step, x), h, mix)


def attention(be: Backend, cfg: Config, w: Weights, c: LayerCache, step: Step, x: Array) -> Array:
    """Multi-query attention over a window of recent rows and, past it, compressed ones."""
    compressors = [m.compressor for m in (w, w.indexer) if m is not None and m.compressor]
    chooser = [w.indexer.weights_proj] if w.indexer else []
    reads_x = [w.wq_a, w.wkv, *(m.wkv_gate for m in compressors), *chooser]
    qa, kv, *more = be.linears(reads_x, x)
    be.remember(w, c, step, kv, more[: len(compressors)], cfg)

    qr = be.rms_norm(w.q_norm, qa, cfg.rms_norm_eps)
    ids = None
    if w.indexer and step.span // 4 > cfg.index_topk:
        q, index_q = be.linears([w.wq_b, w.indexer.wq_b], qr)
        ids = choose_entries(be, cfg, w, c, step, index_q, more[-1])
    else:  # no indexer, or every visible entry is among the best
        q = be.linear(w.wq_b, qr)

    q = q.reshape(len(q), -1, cfg.head_dim)  # all heads, or this rank's
    o = be.attention(w, c, step, q, ids, cfg)
    o = be.grouped_linear(w.wo_a, o.reshape(len(o), -1, cfg.group_width))
    return be.linear(w.wo_b, o.reshape(len(o), -1))


def choose_entries(
    be: Backend, cfg: Config, w: Weights, c: LayerCache, step: Step, q: Array, weights: Array
) -> Array:
    """The indexer: for each token, the compressed entries worth attending to."""
    heads, width = cfg.index_n_heads, cfg.index_head_dim
    q, weights = q.reshape(-1, heads, width), weights * (width * heads) ** -0.5
    return be.index(q, weights, c.index_pool, step, w.freqs, 4, cfg.index_topk)


def moe(be: Backend, cfg: Config, w: Weights, step: Step, x: Array) -> Array:
    """The chosen experts and the shared one."""
    ids, weights = be.route(w.gate, x, step, cfg)
    return be.experts(w, x, ids, weights, cfg.swiglu_limit)
