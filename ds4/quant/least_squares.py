"""Affine codes by a least-squares search: scales and biases of least squared error, not full range.

For each group: try ranges shrunk from either end, take the nearest codes of each, and solve for the
scale and bias that fit these codes best; then alternate nearest codes and best fit from the best
few. Errors are measured with the scale and bias as bf16 stores them. At 2 bits the error is a fifth
to a quarter below that of rounding to the full range, at 3 and 4 bits a fifth.
"""

import math
from typing import Any

from .affine import Encoded, full_range, nearest_codes, pack_groups
from .arrays import CPU, Arrays

Array = Any  # numpy.ndarray or torch.Tensor

_SHRINK = {2: 0.4, 3: 0.55, 4: 0.7, 5: 0.8, 6: 0.88, 8: 0.95}  # the least part of a range tried
_STEPS = {2: 5, 3: 5, 4: 5, 5: 4, 6: 3, 8: 3}  # sizes tried at either end
_KEEP = {2: 2, 3: 2, 4: 2, 5: 1, 6: 1, 8: 1}  # how many of these are refined
_ROUNDS = 3


def encode_least_squares(
    w: Array, bits: int, group: int, importance: Array | None = None, on: Arrays = CPU
) -> Encoded:
    """float32 (R, K), or (B, R, K) of B matrices -> words, scales, biases of least squared error.

    `importance` (K,), or (B, 1, K), positive, weighs the squared error of each input; None weighs
    all alike.
    """
    grouped = w.reshape(*w.shape[:-1], -1, group)
    step = max(on.chunk // math.prod(w.shape[1:]), 1)
    parts = []
    for start in range(0, len(w), step):
        chunk, weights = grouped[start : start + step], importance
        if importance is not None:
            each = importance if importance.ndim == 1 else importance[start : start + step]
            weights = each.reshape(*each.shape[:-1], -1, group)
        scale, bias = search(chunk, bits, weights, on)
        codes = nearest_codes(chunk, scale, bias, bits, on)
        parts.append((on.short(codes), scale, bias))
    codes, scale, bias = (on.xp.concatenate(each) for each in zip(*parts, strict=True))
    return pack_groups(codes.reshape(w.shape), scale, bias, bits, on)


def search(w: Array, bits: int, weights: Array | None, on: Arrays) -> tuple[Array, Array]:
    """(..., group) -> the best scale and bias found for each group, float32 values of bf16.

    `weights`, which may be broadcast to w, are those of the squared errors.
    """
    return _Search(w, bits, weights, on).run()


class _Search:
    """Scales and biases tried on some groups (..., group)."""

    def __init__(self, w: Array, bits: int, weights: Array | None, on: Arrays) -> None:
        self.w, self.bits, self.weights, self.on = w, bits, weights, on
        self.weighted = w if weights is None else w * weights
        self.count = w.shape[-1] if weights is None else on.double(weights).sum(-1)
        self.total = on.double(self.weighted.sum(-1))

    def run(self) -> tuple[Array, Array]:
        xp, sizes = self.on.xp, _sizes(self.bits)
        best = self._improve(*full_range(self.w, self.bits, self.on))
        low, high = xp.amin(self.w, -1), xp.amax(self.w, -1)
        fits = [
            self._fit((high * above - low * below) / (2**self.bits - 1), low * below)
            for below in sizes
            for above in sizes
        ]
        gains, scales, biases = (xp.stack(each) for each in zip(*fits, strict=True))
        for _ in range(_KEEP[self.bits]):
            top = gains.argmax(0)
            scale, bias = (self.on.pick(x, top) for x in (scales, biases))
            best = self._better(best, self._improve(scale, bias))
            gains = xp.where(gains < xp.amax(gains, 0), gains, -1)
        return best[1], best[2]

    def _improve(self, scale: Array, bias: Array) -> tuple[Array, Array, Array]:
        """Alternate nearest codes and best fit; the least error, and its scale and bias."""
        best = self._error(scale, bias)
        for _ in range(_ROUNDS):
            _, scale, bias = self._fit(scale, bias)
            best = self._better(best, self._error(scale, bias))
        return best

    def _better(self, old: tuple[Array, ...], new: tuple[Array, ...]) -> tuple[Array, Array, Array]:
        better = new[0] < old[0]
        error, scale, bias = (self.on.xp.where(better, b, a) for a, b in zip(old, new, strict=True))
        return error, scale, bias

    def _error(self, scale: Array, bias: Array) -> tuple[Array, Array, Array]:
        """The squared error with bf16's scale and bias, and these."""
        scale, bias = self.on.round_bf16(scale), self.on.round_bf16(bias)
        residual = nearest_codes(self.w, scale, bias, self.bits, self.on)
        residual *= scale[..., None]
        residual += bias[..., None]
        residual -= self.w
        weighted = residual if self.weights is None else residual * self.weights
        return self.on.dot(weighted, residual), scale, bias

    def _fit(self, scale: Array, bias: Array) -> tuple[Array, Array, Array]:
        """The scale and bias of least error for the nearest codes on a grid.

        The first result is what the scale takes off the error; the bias fits the rounded scale.
        """
        on, xp = self.on, self.on.xp
        codes = nearest_codes(self.w, scale, bias, self.bits, on)
        weighted = codes if self.weights is None else codes * self.weights
        first, second = on.double(weighted.sum(-1)), on.double(on.dot(codes, weighted))
        product = on.double(on.dot(codes, self.weighted))
        spread = second - first * first / self.count
        excess = product - first * self.total / self.count
        solved = spread > 1e-6 * second  # else all codes are one
        best = xp.where(solved, excess / xp.where(solved, spread, 1), on.double(scale))
        gain = on.single(xp.where(solved, best * excess, 0))
        rounded = on.round_bf16(on.single(best))
        return gain, rounded, on.single((self.total - rounded * first) / self.count)


def _sizes(bits: int) -> list[float]:
    """The parts of a range that are tried at either end."""
    least, steps = _SHRINK[bits], _STEPS[bits]
    return [least + (1 - least) * i / (steps - 1) for i in range(steps)]
