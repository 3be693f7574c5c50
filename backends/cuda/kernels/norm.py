"""RMS norm of float32 rows into the float16 activation of a matrix."""

import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from .early import starts_early


@triton.jit
def normed_row(x, x_row, w, y, t, n, panel, token, eps, BLOCK: tl.constexpr):
    """Row t of x, n long, normed, to y: see rms_norm; `panel` and `token` in units of 8."""
    t, k = t.to(tl.int64), tl.arange(0, BLOCK)
    ok = k < n
    v = tl.load(x + t * x_row + k, ok, 0.0)
    v *= tl.rsqrt(tl.sum(v * v, 0) / n + eps) * tl.load(w + k, ok, 0.0)
    v = tl.minimum(tl.maximum(v, -65504.0), 65504.0).to(tl.float16)
    tl.store(y + ((k // 8).to(tl.int64) * panel + t * token) * 8 + k % 8, v, ok)


@triton.jit
def _rms_norm(x, w, y, n, x_row, panel, token, eps, BLOCK: tl.constexpr, EARLY: tl.constexpr):
    if EARLY:
        gdc_launch_dependents()
        gdc_wait()
    normed_row(x, x_row, w, y, tl.program_id(0), n, panel, token, eps, BLOCK)


def rms_norm(x: Tensor, w: Tensor, y: Tensor, strides: tuple[int, int], eps: float) -> None:
    """x (T, n) float32, any row stride, normed and times w (n,) float32, into y, float16.

    Channel k of token t goes to k // 8 * ps + t * ts + k % 8 with (ps, ts) = `strides`, both
    multiples of 8; n is one too.
    """
    tokens, n = x.shape
    block, early = triton.next_power_of_2(n), starts_early(x, tokens)
    _rms_norm[(tokens,)](
        x, w, y, n, x.stride(0), strides[0] // 8, strides[1] // 8, eps,
        BLOCK=block, EARLY=early, num_warps=max(1, min(8, block // 256)), launch_pdl=early,
    )  # fmt: skip
