"""Cases of the linear kernels: the real model's matrices in the formats of its recipes."""

from collections.abc import Iterator
from typing import Any

import torch
from ds4.backends.cuda import qmatrix
from ds4.backends.cuda.kernels import gemv, gemv_staged
from torch import Tensor

from ds4.weights.synthetic_tensor import Description, SyntheticTensor

from .kernels import Case, cases

FORMATS = (("bf16", 0, 0), ("mxfp8", 0, 0), ("mxfp4", 0, 0), ("affine", 2, 128), ("affine", 6, 64))
SHAPES = ((32768, 1024), (8192, 4096), (4096, 8192), (1024, 4096))
TOKENS = (1, 8, 32)


@cases
def linears() -> Iterator[Case]:
    """A few tokens against one matrix."""
    for kind, bits, group in FORMATS:
        for rows, columns in SHAPES:
            for tokens in TOKENS:
                yield _linear(Description(kind, (rows, columns), 0, 1.0, 0, bits, group), tokens)


def _linear(described: Description, tokens: int) -> Case:
    rows, columns = described.shape

    def make(device: str, number: int) -> Any:
        spec = Description(**vars(described) | {"seed": number, "std": columns**-0.5})
        matrix = qmatrix.from_host(SyntheticTensor(spec), device)
        n = 1 << (tokens - 1).bit_length()
        x = torch.randn(columns // 8, n, 8, device=device).half()
        out = torch.full((tokens, rows), torch.nan, device=device)
        return matrix, x, out, gemv_staged.Halves(device)

    def run(inputs: Any) -> Tensor:
        matrix, x, out, halves = inputs
        product = gemv.Product(matrix, x, out)
        if not gemv_staged.linears([product], tokens, halves):
            gemv.linears([product], tokens)
        return out

    def reference(inputs: Any) -> Tensor:
        matrix, x, *_ = inputs
        values = qmatrix.dequantize(matrix)[0].double()
        return x.transpose(0, 1).flatten(1)[:tokens].double() @ values.T

    name = f"linear {described.format}{described.bits or ''} {rows} x {columns}, {tokens} tokens"
    nbytes = SyntheticTensor(described).nbytes + 2 * tokens * columns + 4 * tokens * rows
    return Case(name, make, run, reference, nbytes, tolerance=1e-3)
