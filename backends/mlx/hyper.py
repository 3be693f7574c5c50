"""Hyper-connections in stock operations, and the twins of their Metal kernels (spec 3.3, 3.11)."""

import functools
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np

from ds4.backend import Weights
from ds4.config import Config


def mix(
    w: Weights, norm: mx.array, h: mx.array, raw: mx.array, cfg: Config
) -> tuple[mx.array, mx.array, mx.array]:
    """Streams (T, H, D) and their projection -> input (T, D), post (T, H), comb (T, H, H).

    `raw` (T, 2 H + H * H) is the streams through the mixing matrix, not yet divided by their norm.

    The four rows of comb are followed by one that begins with 1: its column of the sums is eps.
    """
    H, rounds, eps = cfg.hc_mult, cfg.hc_sinkhorn_iters, cfg.hc_eps
    c = _constants(H, eps)
    mixes = raw * _inverse_norm(h, cfg) * _scales(w, c) + w.base
    gates = mx.sigmoid(mixes[:, : 2 * H]) * c.factor + c.offset
    pre, post = gates[:, None, :H], gates[:, H:]
    comb = mx.softmax(mixes[:, 2 * H :].reshape(-1, H, H), -1).flatten(1)
    comb = mx.concatenate([comb + eps, _ones(len(h))], 1)
    comb = comb / (comb @ c.columns)
    for _ in range(rounds - 1):
        comb = comb / (comb @ c.rows)
        comb = comb / (comb @ c.columns)
    comb = comb[:, : H * H].reshape(-1, H, H)
    x = mx.fast.rms_norm((pre @ h).squeeze(1), norm, cfg.rms_norm_eps)
    return x, post, comb


def spread(x: mx.array, h: mx.array, post: mx.array, comb: mx.array) -> mx.array:
    """Sublayer output (T, D) and streams (T, H, D) -> streams (T, H, D)."""
    return mx.addmm(post[:, :, None] * x[:, None], comb.swapaxes(1, 2), h)


def head(w: Weights, h: mx.array, cfg: Config) -> mx.array:
    """(T, H, D) -> (T, D): the streams weighed into one."""
    mixes = w.fn.matmul(h.flatten(1)) * _inverse_norm(h, cfg) * w.scale + w.base
    return ((mx.sigmoid(mixes) + cfg.hc_eps)[:, None] @ h).squeeze(1)


def _scales(w: Weights, c: "_Constants") -> mx.array:
    """One scale for each mix, made at the first use and kept beside the weights."""
    if not hasattr(w, "scales"):
        w.scales = w.scale[c.thirds]
        mx.eval(w.scales)
    scales: mx.array = w.scales
    return scales


@functools.lru_cache(8)
def _ones(tokens: int) -> mx.array:
    ones = mx.ones((tokens, 1))
    mx.eval(ones)
    return ones


def _inverse_norm(h: mx.array, cfg: Config) -> mx.array:
    return mx.rsqrt(mx.square(h.flatten(1)).mean(-1, keepdims=True) + cfg.rms_norm_eps)


class _Constants(NamedTuple):
    thirds: mx.array  # which of three scales each mix has
    factor: mx.array  # of the sigmoids
    offset: mx.array
    columns: mx.array  # (H * H + 1, H * H + 1): (matrix, 1) @ this = column sums + eps, 1
    rows: mx.array  # the same for rows


@functools.cache
def _constants(n: int, eps: float) -> _Constants:
    """A matrix product with zeros, ones and eps does the work of a sum, a broadcast and an add."""
    ones, eye = np.ones((n, n), np.float32), np.eye(n, dtype=np.float32)

    def sums(blocks: Any) -> mx.array:
        whole = np.pad(blocks, (0, 1))
        whole[-1] = eps
        whole[-1, -1] = 1
        return mx.array(whole)

    constants = _Constants(
        mx.array([0] * n + [1] * n + [2] * n * n),
        mx.array([1.0] * n + [2.0] * n),
        mx.array([eps] * n + [0.0] * n),
        sums(np.kron(ones, eye)),
        sums(np.kron(eye, ones)),
    )
    mx.eval(*constants)
    return constants
