"""Formulas that several operations of the reference have in common, in float32."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
f32 = np.float32
FEW = 32  # tokens that are multiplied one by one: BLAS adds up in another order for each number


def times(x: Array, w: Array) -> Array:
    """(T, K) by (N, K) -> (T, N). Of up to FEW tokens each has the bits that it has alone."""
    return (w @ x[:, :, None])[:, :, 0] if len(x) <= FEW else x @ w.T


def largest(x: Array, k: int) -> Array:
    """Indices of the k largest along the last axis, best first; of equals the lower index."""
    return np.argsort(-x, -1, kind="stable")[..., :k]


def sigmoid(x: Array) -> Array:
    e = np.exp(-np.abs(x))
    return np.where(x >= 0, 1, e) / (1 + e)


def softmax(x: Array, axis: int = -1) -> Array:
    e = np.exp(x - x.max(axis, keepdims=True))
    return e / e.sum(axis, keepdims=True)


def swiglu(gate: Array, up: Array, limit: float) -> Array:
    """silu(gate) * up, the gate clamped above only, up on both sides (spec 3.10)."""
    gate, up = np.minimum(gate, f32(limit)), np.clip(up, -f32(limit), f32(limit))
    return gate * sigmoid(gate) * up
