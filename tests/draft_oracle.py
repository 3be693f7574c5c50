"""MTP and DSpark written down once more, from their description: NumPy, no cache, no steps.

`w` is a dict of float32 arrays under the checkpoint's names. Streams are (T, H, D).
"""

from typing import Any

import numpy as np

from ds4.config import Config
from ds4.quant import formats

Array = np.ndarray[Any, Any]


def rms(x: Array, weight: Array | float, eps: float) -> Array:
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + eps) * weight


def sigmoid(x: Array) -> Array:
    return 1 / (1 + np.exp(-x))


def rope(x: Array, pos: Array, cfg: Config, sign: int = 1) -> Array:
    """The last channels of (T, ..., C) turned in pairs; theta as for windows, no YaRN."""
    rd = cfg.qk_rope_head_dim
    out = x.copy()
    for t, p in enumerate(pos):
        for pair in range(rd // 2):
            angle = sign * p * cfg.rope_theta ** (-2 * pair / rd)
            a = x.shape[-1] - rd + 2 * pair
            turn = np.exp(1j * angle) * (x[t, ..., a] + 1j * x[t, ..., a + 1])
            out[t, ..., a], out[t, ..., a + 1] = turn.real, turn.imag
    return out


def mixed(w: dict[str, Array], part: str, X: Array, cfg: Config) -> tuple[Array, Array, Array]:
    """What a sublayer reads (T, D), and post (T, H), comb (T, H, H) for what it says."""
    H, eps = cfg.hc_mult, cfg.hc_eps
    m = rms(X.reshape(len(X), -1), 1.0, cfg.rms_norm_eps) @ w[f"{part}_fn"].T
    scale, base = w[f"{part}_scale"], w[f"{part}_base"]
    pre = sigmoid(m[:, :H] * scale[0] + base[:H]) + eps
    post = 2 * sigmoid(m[:, H : 2 * H] * scale[1] + base[H : 2 * H])
    A = (m[:, 2 * H :] * scale[2] + base[2 * H :]).reshape(-1, H, H)
    C = np.exp(A - A.max(2, keepdims=True))
    C = C / C.sum(2, keepdims=True) + eps
    C = C / (C.sum(1, keepdims=True) + eps)
    for _ in range(cfg.hc_sinkhorn_iters - 1):
        C = C / (C.sum(2, keepdims=True) + eps)
        C = C / (C.sum(1, keepdims=True) + eps)
    return (pre[:, :, None] * X).sum(1), post, C


def spread(y: Array, X: Array, post: Array, C: Array) -> Array:
    return post[:, :, None] * y[:, None] + np.einsum("tjk,tjd->tkd", C, X)


def head(w: dict[str, Array], X: Array, cfg: Config) -> Array:
    m = rms(X.reshape(len(X), -1), 1.0, cfg.rms_norm_eps) @ w["hc_head_fn"].T
    return ((sigmoid(m * w["hc_head_scale"] + w["hc_head_base"]) + cfg.hc_eps)[:, :, None] * X).sum(
        1
    )


def key_values(w: dict[str, Array], x: Array, pos: Array, cfg: Config, native: bool) -> Array:
    rows = rms(x @ w["attn.wkv.weight"].T, w["attn.kv_norm.weight"], cfg.rms_norm_eps)
    rows = rope(rows, pos, cfg)
    return formats.round_kv(rows, cfg.qk_rope_head_dim) if native else rows


def attend(
    w: dict[str, Array], y: Array, pos: Array, keys: Array, seen: Array, cfg: Config
) -> Array:
    """`seen` (T, K) says which keys each token sees."""
    heads, groups = cfg.num_attention_heads, cfg.o_groups
    q = rms(y @ w["attn.wq_a.weight"].T, w["attn.q_norm.weight"], cfg.rms_norm_eps)
    q = (q @ w["attn.wq_b.weight"].T).reshape(len(y), heads, -1)
    q = rope(rms(q, 1.0, cfg.rms_norm_eps), pos, cfg)
    logits = np.einsum("tnc,kc->tnk", q, keys) * cfg.head_dim**-0.5
    share = np.where(seen[:, None], np.exp(logits), 0)
    share = share / (share.sum(-1, keepdims=True) + np.exp(w["attn.attn_sink"])[:, None])
    o = rope(np.einsum("tnk,kc->tnc", share, keys), pos, cfg, -1).reshape(len(y), groups, -1)
    wo_a = w["attn.wo_a.weight"].reshape(groups, -1, o.shape[-1])
    return np.einsum("tgi,goi->tgo", o, wo_a).reshape(len(y), -1) @ w["attn.wo_b.weight"].T


def expert(w: dict[str, Array], name: str, x: Array, limit: float) -> Array:
    gate = np.minimum(x @ w[f"{name}.w1.weight"].T, limit)
    up = np.clip(x @ w[f"{name}.w3.weight"].T, -limit, limit)
    return (gate * sigmoid(gate) * up) @ w[f"{name}.w2.weight"].T


def feed_forward(w: dict[str, Array], x: Array, cfg: Config) -> Array:
    out = expert(w, "ffn.shared_experts", x, cfg.swiglu_limit)
    scores = np.sqrt(np.log1p(np.exp(x @ w["ffn.gate.weight"].T)))
    for t in range(len(x)):
        order = np.argsort(-(scores[t] + w["ffn.gate.bias"]), kind="stable")
        chosen = order[: cfg.num_experts_per_tok]
        for e in chosen:
            weight = scores[t, e] / scores[t, chosen].sum() * cfg.routed_scaling_factor
            out[t] += weight * expert(w, f"ffn.experts.{e}", x[t], cfg.swiglu_limit)
    return out


def part_of(w: dict[str, Array], prefix: str) -> dict[str, Array]:
    return {name.removeprefix(prefix): x for name, x in w.items() if name.startswith(prefix)}


def mtp(
    w: dict[str, Array], cfg: Config, X: Array, tokens: list[int], guesses: int, native: bool
) -> Array:
    """Streams X_0 .. X_{P-1} and tokens t_0 .. t_P -> logits (guesses, V) of t_{P+1}, ...

    A guess is the best token of the logits before it.
    """
    m, eps = part_of(w, "mtp.0."), cfg.rms_norm_eps
    joined = [_slot(m, w, X[i], tokens[i + 1], eps) for i in range(len(X))]
    logits = []
    for _ in range(guesses):
        Z, pos = np.stack(joined), np.arange(len(joined))
        y, post, C = mixed(m, "hc_attn", Z, cfg)
        y = rms(y, m["attn_norm.weight"], eps)
        behind = pos[:, None] - pos
        seen = (behind >= 0) & (behind < cfg.sliding_window)
        keys = key_values(m, y, pos, cfg, native)
        Z = spread(attend(m, y, pos, keys, seen, cfg), Z, post, C)
        y, post, C = mixed(m, "hc_ffn", Z, cfg)
        Z = spread(feed_forward(m, rms(y, m["ffn_norm.weight"], eps), cfg), Z, post, C)
        out = rms(head(m, Z[-1:], cfg), m["norm.weight"], eps) @ w["head.weight"].T
        logits.append(out[0])
        joined.append(_slot(m, w, Z[-1], int(out.argmax()), eps))
    return np.stack(logits)


def _slot(m: dict[str, Array], w: dict[str, Array], X: Array, token: int, eps: float) -> Array:
    e = m["e_proj.weight"] @ rms(w["embed.weight"][token], m["enorm.weight"], eps)
    return np.stack([e + m["h_proj.weight"] @ rms(x, m["hnorm.weight"], eps) for x in X])


def dspark(
    w: dict[str, Array], cfg: Config, taps: list[Array], anchor: int, native: bool
) -> tuple[Array, Array]:
    """Streams after each tapped layer, (P, H, D), and token t_P -> logits (5, V), confidences (5,).

    A guess is the best token of its logits.
    """
    eps, d, P = cfg.rms_norm_eps, cfg.dspark, len(taps[0])
    u = np.concatenate([X.mean(1) for X in taps], -1)
    c = rms(u @ w["mtp.0.main_proj.weight"].T, w["mtp.0.main_norm.weight"], eps)
    ids = [anchor] + [d.noise_token] * (d.block_size - 1)
    pos, before = P + np.arange(d.block_size), np.arange(max(0, P - cfg.sliding_window), P)
    X = np.repeat(w["embed.weight"][ids][:, None], cfg.hc_mult, 1)
    for stage in range(3):
        m = part_of(w, f"mtp.{stage}.")
        y, post, C = mixed(m, "hc_attn", X, cfg)
        y = rms(y, m["attn_norm.weight"], eps)
        rows = key_values(m, c[before], before, cfg, native)
        keys = np.concatenate([rows, key_values(m, y, pos, cfg, native)])
        seen = np.ones((len(ids), len(keys)), bool)
        X = spread(attend(m, y, pos, keys, seen, cfg), X, post, C)
        y, post, C = mixed(m, "hc_ffn", X, cfg)
        X = spread(feed_forward(m, rms(y, m["ffn_norm.weight"], eps), cfg), X, post, C)
    m = part_of(w, "mtp.2.")
    h = head(m, X, cfg)
    U = rms(h, m["norm.weight"], eps) @ w["head.weight"].T
    logits, sure, token = [], [], anchor
    for j in range(d.block_size):
        row = m["markov_head.markov_w1.weight"][token]
        logits.append(U[j] + m["markov_head.markov_w2.weight"] @ row)
        sure.append(m["confidence_head.proj.weight"][0] @ np.concatenate([h[j], row]))
        token = int(logits[-1].argmax())
    return np.stack(logits), np.array(sure)
