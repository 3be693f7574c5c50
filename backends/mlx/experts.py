"""The router and the experts in few large operations (spec 3.10)."""

import functools

import mlx.core as mx

from ds4.backend import Weights
from ds4.config import Config

from .weights import Matrix, joined

SORTED_FROM = 64  # (token, expert) pairs from which sorting them by expert pays


def route(w: Weights, logits: mx.array, tokens: mx.array, cfg: Config) -> tuple[mx.array, mx.array]:
    """Expert ids and weights (T, K), from the router's logits (T, E)."""
    scores = mx.sqrt(mx.logaddexp(logits, 0.0))
    if w.tid2eid is not None:
        ids = w.tid2eid[tokens]
    else:  # sorting is stable: of equal ones the lower id comes first
        ids = mx.argsort(-(scores + w.bias), -1)[:, : cfg.num_experts_per_tok]
    weights = mx.take_along_axis(scores, ids, -1)
    tiny, ones = _shares(weights.shape[1], cfg.routed_scaling_factor)
    return ids, weights / mx.addmm(tiny, weights, ones)


@functools.cache
def _shares(k: int, factor: float) -> tuple[mx.array, mx.array]:
    """A product with these is the sum over `factor`, in each of k places."""
    shares = mx.array([1e-20 / factor]), mx.full((k, k), 1 / factor)
    mx.eval(*shares)
    return shares


def swiglu(gate_up: mx.array, limit: float) -> mx.array:
    """(..., 2 I) -> (..., I): silu of the gate, clamped above, times up, clamped on both sides."""
    gate, up = mx.split(mx.minimum(gate_up, limit), 2, -1)
    return gate * mx.sigmoid(gate) * mx.maximum(up, -limit)


def gate_up(w: Weights) -> Matrix:
    """w1 over w3 as one matrix, or one stack of them."""
    return joined(w.w1, w.w3)


def routed(
    w: Weights, x: mx.array, ids: mx.array, weights: mx.array, limit: float, base: mx.array
) -> mx.array:
    """`base` (T, D) and the weighted sum of each token's experts."""
    tokens, k = ids.shape
    if tokens * k < SORTED_FROM:
        a = swiglu(gate_up(w).gather_matmul(x[:, None, None], ids), limit)
        y = w.w2.gather_matmul(a, ids).squeeze(2)
    else:
        order = mx.argsort(ids.flatten())
        back, chosen = mx.argsort(order), ids.flatten()[order]
        a = gate_up(w).gather_matmul(x[order // k][:, None], chosen, ordered=True)
        y = w.w2.gather_matmul(swiglu(a, limit), chosen, ordered=True)
        y = y.squeeze(1)[back].reshape(tokens, k, -1)
    return mx.addmm(base[:, None], weights[:, None], y).squeeze(1)
