"""DeepSeek-V4, written once for every backend.

This file imports no array library: `be` does the arithmetic, and the code below only says what
feeds what. Weight names are the checkpoint's own; shapes stand in backend.py.
"""

from .backend import Array, Backend, Rows, Weight, Weights
from .cache import LayerCache
from .config import Config
from .step import Step


def forward(be: Backend, cfg: Config, w: Weights, cache: list[LayerCache], step: Step) -> Array:
    """Run one step, update the cache, and return logits for the rows in step.last."""
    h = be.embed(w.embed, step.tokens, cfg.hc_mult)
    for layer, c in zip(w.layers, cache, strict=True):
        h = block(be, cfg, layer, c, step, h)
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
    eps, ratio, heads = cfg.rms_norm_eps, w.ratio, cfg.num_attention_heads

    qr = be.rms_norm(w.q_norm, be.linear(w.wq_a, x), eps)
    q = be.linear(w.wq_b, qr).reshape(-1, heads, cfg.head_dim)
    q = be.rope(be.rms_norm(None, q, eps), step.pos, w.freqs)
    kv = be.rope(be.rms_norm(w.kv_norm, be.linear(w.wkv, x), eps), step.pos, w.freqs)
    be.write(c.window, kv, step)

    ids = None
    if ratio:
        pool_blocks(be, w.compressor, c.rows, c.pool, step, x, w.freqs, ratio, eps)
    if ratio == 4:
        ids = choose_entries(be, cfg, w, c, step, x, qr)

    o = be.attention(q, c.window, w.attn_sink, step, cfg.sliding_window, c.pool, ids, ratio)
    o = be.rope(o, step.pos, w.freqs, inverse=True)
    o = be.grouped_linear(w.wo_a, o.reshape(len(o), cfg.o_groups, -1))
    return be.linear(w.wo_b, o.reshape(len(o), -1))


def pool_blocks(
    be: Backend,
    w: Weights,
    rows: Rows,
    pool: Rows,
    step: Step,
    x: Array,
    freqs: Weight,
    ratio: int,
    eps: float,
) -> None:
    """Keep this step's projected rows, and pool every block that is now complete."""
    be.write(rows, be.linear(w.wkv_gate, x), step)
    be.compress(w, rows, pool, step.emit[ratio], freqs, ratio, eps)


def choose_entries(
    be: Backend, cfg: Config, w: Weights, c: LayerCache, step: Step, x: Array, qr: Array
) -> Array:
    """The indexer: for each token, the compressed entries worth attending to."""
    i, heads, eps = w.indexer, cfg.index_n_heads, cfg.rms_norm_eps
    pool_blocks(be, i.compressor, c.index_rows, c.index_pool, step, x, w.freqs, 4, eps)
    q = be.linear(i.wq_b, qr).reshape(-1, heads, cfg.index_head_dim)
    q = be.rope(q, step.pos, w.freqs)
    weights = be.linear(i.weights_proj, x) * (cfg.index_head_dim * heads) ** -0.5
    return be.index(q, weights, c.index_pool, step, 4, cfg.index_topk)


def moe(be: Backend, cfg: Config, w: Weights, step: Step, x: Array) -> Array:
    """The chosen experts and the shared one."""
    ids, weights = be.route(w.gate, x, step.tokens, cfg)
    routed = be.experts(w.experts, x, ids, weights, cfg.swiglu_limit)
    return routed + be.mlp(w.shared_experts, x, cfg.swiglu_limit)
