"""Affine codes by a least-squares search: scales and biases of least squared error, not full range.

For each group: try ranges shrunk from either end, take the nearest codes of each, and solve for the
scale and bias that fit these codes best; then alternate nearest codes and best fit from the best
few. Errors are measured with the scale and bias as bf16 stores them. At 2 bits the error is a fifth
to a quarter below that of rounding to the full range, at 3 and 4 bits a fifth.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from .affine import Encoded, full_range, nearest_codes, pack_groups, round_bf16

Array = NDArray[Any]
f32 = np.float32
f64 = np.float64

_SHRINK = {2: 0.4, 3: 0.55, 4: 0.7, 5: 0.8, 6: 0.88, 8: 0.95}  # the least part of a range tried
_STEPS = {2: 6, 3: 5, 4: 5, 5: 4, 6: 3, 8: 3}  # sizes tried at either end
_KEEP = {2: 2, 3: 2, 4: 2, 5: 1, 6: 1, 8: 1}  # how many of these are refined
_ROUNDS = 3
_CHUNK = 1 << 18  # values at a time: smaller ones wait for Python, larger ones for memory


def encode_least_squares(
    w: Array, bits: int, group: int, importance: Array | None = None
) -> Encoded:
    """float32 (..., K) -> words, scales, biases of least squared error.

    `importance` (K,), positive, weighs the squared error of each input; None weighs all alike.
    """
    groups = np.ascontiguousarray(w, f32).reshape(-1, group)
    codes = np.empty(groups.shape, np.uint8)
    scale, bias = np.empty((2, len(groups)), f32)
    weights = None
    if importance is not None:
        weights = np.asarray(importance, f32).reshape(-1, group)
    step = max(_CHUNK // w.shape[-1], 1) * (w.shape[-1] // group)  # whole rows
    for start in range(0, len(groups), step):
        at = slice(start, start + step)
        chunk = groups[at]
        repeated = None if weights is None else np.tile(weights, (len(chunk) // len(weights), 1))
        search = _Search(chunk, repeated, bits)
        scale[at], bias[at] = search.run()
        codes[at] = nearest_codes(chunk, scale[at], bias[at], bits)
    return pack_groups(codes, scale, bias, w.shape, bits)


class _Search:
    """Scales and biases tried on some groups (n, group)."""

    def __init__(self, w: Array, weights: Array | None, bits: int) -> None:
        self.w, self.weights, self.bits = w, weights, bits
        self.weighted = w if weights is None else w * weights
        self.count = self._sum(np.ones_like(w))
        self.total = self.weighted.sum(-1, dtype=f64)

    def run(self) -> tuple[Array, Array]:
        """The best scale and bias found for each group, as bf16 holds them."""
        keep = _KEEP[self.bits]
        tried = [self._improve(*full_range(self.w, self.bits))]
        low, high = self.w.min(-1), self.w.max(-1)
        sizes = np.linspace(_SHRINK[self.bits], 1, _STEPS[self.bits], dtype=f32)
        starts = [
            ((high * above - low * below) / f32(2**self.bits - 1), low * below)
            for below in sizes
            for above in sizes
        ]
        fits = [self._fit(*start) for start in starts]
        gains = np.stack([gain for gain, _, _ in fits])
        order = np.argsort(-gains, 0, kind="stable")[:keep]
        scales, biases = (np.stack([fit[i] for fit in fits]) for i in (1, 2))
        each = np.arange(len(self.w))
        for rank in range(keep):
            chosen = order[rank], each
            tried.append(self._improve(scales[chosen], biases[chosen]))
        errors, scales, biases = (np.stack(column) for column in zip(*tried, strict=True))
        best = errors.argmin(0), each
        return scales[best], biases[best]

    def _improve(self, scale: Array, bias: Array) -> tuple[Array, Array, Array]:
        """Alternate nearest codes and best fit; the least error, and its scale and bias."""
        best = self._error(scale, bias)
        for _ in range(_ROUNDS):
            _, scale, bias = self._fit(scale, bias)
            found = self._error(scale, bias)
            better = found[0] < best[0]
            for old, new in zip(best, found, strict=True):
                np.copyto(old, new, where=better)
        return best

    def _error(self, scale: Array, bias: Array) -> tuple[Array, Array, Array]:
        """The squared error with bf16's scale and bias, and these."""
        scale, bias = round_bf16(scale), round_bf16(bias)
        residual = nearest_codes(self.w, scale, bias, self.bits)
        residual *= scale[:, None]
        residual += bias[:, None]
        residual -= self.w
        weighted = residual if self.weights is None else residual * self.weights
        return np.einsum("ij,ij->i", weighted, residual), scale, bias

    def _fit(self, scale: Array, bias: Array) -> tuple[Array, Array, Array]:
        """The scale and bias of least error for the nearest codes on a grid.

        The first result is what the scale takes off the error; the bias fits the rounded scale.
        """
        codes = nearest_codes(self.w, scale, bias, self.bits)
        first, second = self._sum(codes), self._sum(codes, codes)
        product = np.einsum("ij,ij->i", codes, self.weighted).astype(f64)
        spread = second - first * first / self.count
        excess = product - first * self.total / self.count
        solved = spread > 1e-9 * second  # else all codes are one
        best = np.divide(excess, spread, out=scale.astype(f64), where=solved)
        gain = np.where(solved, best * excess, 0)
        rounded = round_bf16(best.astype(f32))
        return gain, rounded, ((self.total - rounded * first) / self.count).astype(f32)

    def _sum(self, *factors: Array) -> Array:
        """Each group's weighted sum of a product, float64."""
        if self.weights is not None:
            factors = (*factors, self.weights)
        if len(factors) == 1:
            return factors[0].sum(-1, dtype=f64)
        letters = ",".join(["ij"] * len(factors))
        return np.einsum(f"{letters}->i", *factors).astype(f64)
