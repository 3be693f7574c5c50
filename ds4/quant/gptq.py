"""GPTQ: affine codes chosen one input at a time, each rounding error made good by the inputs after.

With H the mean of x x^T over a layer's inputs, the error of a row is (w - q) H (w - q)^T. Let U be
the upper Cholesky factor of H's inverse: an error e at input j is compensated by taking
e U[j, k] / U[j, j] off each later input k, and what remains costs e^2 / U[j, j]^2. So each group's
scale and bias come from the least-squares search over weights already compensated for the groups
before, with 1 / U[j, j]^2 as the importance.

Frantar et al. 2022, arXiv 2210.17323. NumPy or PyTorch, see arrays.py.
"""

from typing import Any

from .affine import Encoded, pack_groups
from .arrays import Arrays
from .least_squares import search

Array = Any

DAMPING = 0.05  # of the mean diagonal of H, added to it


def factor(hessian: Array, on: Arrays) -> Array:
    """(..., K, K) float64, symmetric, semidefinite -> U (..., K, K) float32."""
    xp = on.xp
    diagonal = xp.diagonal(hessian, 0, -2, -1)
    least = DAMPING * diagonal.mean(-1) + 1e-30
    inverse = xp.linalg.inv(hessian + least[..., None, None] * on.identity(hessian.shape[-1]))
    return on.single(xp.linalg.cholesky(inverse)).swapaxes(-2, -1)


def encode_gptq(w: Array, bits: int, group: int, upper: Array, on: Arrays) -> Encoded:
    """float32 (B, R, K) and U (B or 1, K, K) -> words, scales, biases of B matrices."""
    errors, parts = on.xp.zeros_like(w), []
    for start in range(0, w.shape[-1], group):
        at = slice(start, start + group)
        due = errors[..., :start] @ upper[..., :start, at]
        codes, scale, bias, errors[..., at] = _encode_group(
            w[..., at] - due, bits, upper[..., at, at], on
        )
        parts.append((codes, scale, bias))
    codes, scale, bias = (on.xp.stack(each, -1) for each in zip(*parts, strict=True))
    codes = codes.swapaxes(-2, -1).reshape(w.shape)
    return pack_groups(codes, scale, bias, bits, on)


def _encode_group(
    w: Array, bits: int, upper: Array, on: Arrays
) -> tuple[Array, Array, Array, Array]:
    """(B, R, g), (B or 1, g, g) -> codes (B, R, g), scales, biases (B, R), errors / U[j, j]."""
    xp = on.xp
    diagonal = xp.diagonal(upper, 0, -2, -1)
    scale, bias = search(w, bits, (1 / diagonal**2)[..., None, :], on)
    inverse = xp.where(scale != 0, 1 / xp.where(scale != 0, scale, 1), 0)
    left = xp.stack([w[..., j] for j in range(w.shape[-1])], -2)  # (B, g, R): inputs by row
    codes, errors = xp.zeros_like(left), xp.zeros_like(left)
    for j in range(w.shape[-1]):
        now = left[..., j, :]
        code = xp.clip(on.round((now - bias) * inverse), 0, 2**bits - 1)
        error = (now - bias - code * scale) / diagonal[..., j, None]
        codes[..., j, :], errors[..., j, :] = code, error
        left[..., j + 1 :, :] -= upper[..., j, j + 1 :, None] * error[..., None, :]
    return on.short(codes).swapaxes(-2, -1), scale, bias, errors.swapaxes(-2, -1)
