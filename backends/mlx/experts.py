"""The router and the experts in few large operations (spec 3.10)."""

import functools

import mlx.core as mx

from ds4.backend import Weights

from .weights import Beside, Matrix, one_over_the_other

SORTED_FROM = 64  # (token, expert) pairs from which sorting them by expert pays


def biased(logits: mx.array, bias: mx.array, k: int, factor: float) -> tuple[mx.array, mx.array]:
    """(T, E) and (E,) -> ids and weights (T, K) of the largest score + bias."""
    scores = _scores(logits)
    ids = mx.argsort(-(scores + bias), -1)[:, :k]  # stable: of equal ones the lower id
    return ids, _weights(scores, ids, factor)


def listed(logits: mx.array, ids: mx.array, factor: float) -> tuple[mx.array, mx.array]:
    """(T, E) and ids (T, K) from a table -> these and their weights."""
    return ids, _weights(_scores(logits), ids, factor)


def _scores(logits: mx.array) -> mx.array:
    return mx.sqrt(mx.logaddexp(logits, 0.0))


def _weights(scores: mx.array, ids: mx.array, factor: float) -> mx.array:
    weights = mx.take_along_axis(scores, ids, -1)
    tiny, ones = _shares(weights.shape[1], factor)
    return weights / mx.addmm(tiny, weights, ones)


@functools.cache
def _shares(k: int, factor: float) -> tuple[mx.array, mx.array]:
    """A product with these is the sum over `factor`, in each of k places."""
    shares = mx.array([1e-20 / factor]), mx.full((k, k), 1 / factor)
    mx.eval(*shares)
    return shares


def swiglu(gate_up: mx.array, limit: float) -> mx.array:
    """(..., 2 I) -> (..., I): silu of the gate, clamped above, times up, clamped on both sides."""
    on_gpu = mx.default_device().type == mx.DeviceType.gpu
    return (_compiled_swiglu if on_gpu else _swiglu)(gate_up, limit)


def _swiglu(gate_up: mx.array, limit: float) -> mx.array:
    gate, up = mx.split(mx.minimum(gate_up, limit), 2, -1)
    return gate * mx.sigmoid(gate) * mx.maximum(up, -limit)


# One command on a GPU; on a CPU it gains nothing, and needs a C++ compiler at run time.
_compiled_swiglu = mx.compile(_swiglu)


def gate_up(w: Weights) -> Matrix | Beside:
    """w1 over w3 as one matrix, or one stack of them."""
    return one_over_the_other(w.w1, w.w3)


def gated(x: mx.array, stack: Matrix | Beside, ids: mx.array, limit: float) -> mx.array:
    """(T, D), gates over ups of experts, (T, K) -> (T, K, I)."""
    return swiglu(stack.gather_matmul(x[:, None, None], ids), limit).squeeze(2)


def few(w: Weights, a: mx.array, ids: mx.array, weights: mx.array, base: mx.array) -> mx.array:
    """The second half of experts for a few tokens: `a` (T, K, I) -> (T, D), added to `base`."""
    y = w.w2.gather_matmul(a[:, :, None], ids).squeeze(2)
    return mx.addmm(base[:, None], weights[:, None], y).squeeze(1)


def many(
    w: Weights, x: mx.array, ids: mx.array, weights: mx.array, limit: float, base: mx.array
) -> mx.array:
    """All of it for many tokens, (T, D) -> (T, D): pairs of token and expert sorted by expert."""
    tokens, k = ids.shape
    order = mx.argsort(ids.flatten())
    back, expert = mx.argsort(order), ids.flatten()[order]
    a = gate_up(w).gather_matmul(x[order // k][:, None], expert, ordered=True)
    y = w.w2.gather_matmul(swiglu(a, limit), expert, ordered=True)
    y = y.squeeze(1)[back].reshape(tokens, k, -1)
    return mx.addmm(base[:, None], weights[:, None], y).squeeze(1)


def product(x: mx.array, matrix: Matrix) -> mx.array:
    """(T, in) -> (T, out)"""
    return matrix.matmul(x)
