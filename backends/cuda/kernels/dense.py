"""Dense matrices against many tokens, by whichever of two ways was measured to be faster.

Packed, by gemm.cu; or unpacked into fp16 values for the call's duration, and multiplied by cuBLAS:
the same fp16 factors and float32 sums, in another order. Unpacking takes the same time for any
number of tokens; of a small matrix it is short, and gemm.cu's tiles are too few to fill a GPU.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import nvrtc
from ..qmatrix import QMatrix
from . import gemm

MANY, LONG = 512, 4096  # tokens from which on a matrix with rows of LONG or more is unpacked
MORE = 1024  # and any other
SMALL = 1 << 22  # values of a matrix that is for any number of tokens
LARGEST = 65504.0  # of fp16
LIFT = 14  # gemm_codes.cu


def linears(matrices: Sequence[QMatrix], x: Tensor, outs: Sequence[Tensor]) -> None:
    """outs[i] float32 (T, rows) = x @ matrices[i].T of fp16 (T, K), rows contiguous."""
    ordered: dict[int, Tensor] = {}
    for m, out in zip(matrices, outs, strict=True):
        if unpacks(m, len(x)):
            _multiply(m, x, out)
            continue
        if gemm.spread(m) not in ordered:
            ordered[gemm.spread(m)] = gemm.permute(x, m)
        gemm.linear(m, ordered[gemm.spread(m)], out)


def grouped(m: QMatrix, x: Tensor, out: Tensor, groups: int) -> None:
    """out fp16 (T, rows), saturating: rows of group g meet columns of group g of x only."""
    if not unpacks(m, len(x)):
        gemm.linear(m, gemm.permute(x, m), out, groups)
        return
    inputs, sums = (t.view(len(t), groups, -1).transpose(0, 1) for t in (x, out))
    values = unpacked(m).view(groups, -1, m.cols).transpose(1, 2)
    if nvrtc.compiling.get() is not None:
        return
    allowed = torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction
    torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False
    torch.baddbmm(sums, inputs, values, beta=0, alpha=unit(m), out=sums)
    torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = allowed
    out.clamp_(-LARGEST, LARGEST)


def unpacks(m: QMatrix, tokens: int) -> bool:
    """Whether to unpack; plain values are multiplied as they lie."""
    if m.format == "f16" or m.rows * m.cols <= SMALL:
        return True
    return tokens >= (MANY if m.cols >= LONG else MORE)


def unpacked(m: QMatrix) -> Tensor:
    """fp16 (rows, cols): the values divided by `unit`."""
    if m.format == "f16":
        return m.plain
    values = torch.empty(m.rows, m.cols, dtype=torch.float16, device=m.blob.device)
    grid = -(-values.numel() // (32 * gemm.THREADS)), 1, 1
    kernel = gemm.unpacking(m.format, m.bits, m.group)
    kernel(grid, gemm.THREADS, gemm.Matrix(m), gemm.address(values))
    return values


def unit(m: QMatrix) -> float:
    assert m.exponent is not None
    return 2.0 ** (m.exponent - (LIFT if m.format == "affine" else 0))


def _multiply(m: QMatrix, x: Tensor, out: Tensor) -> None:
    values = unpacked(m)
    if nvrtc.compiling.get() is not None:
        return
    if x.is_cuda:
        torch.addmm(out, x, values.T, out_dtype=torch.float32, beta=0, alpha=unit(m), out=out)
    else:  # has no product of fp16 with float32 sums
        torch.mm(x.float(), values.float().T * unit(m), out=out)
