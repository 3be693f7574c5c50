"""dense.py without a GPU: gemm_unpack.cu's threads run on the CPU, and PyTorch multiplies there."""

import ctypes
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="the kernels' package needs triton")
from ds4.backends.cuda import qmatrix
from ds4.backends.cuda.kernels import dense, gemm
from ds4.backends.cuda.qmatrix import QMatrix

from tests.cuda_block import cuda_block

FORMATS = [
    ("mxfp8", 8, 32),
    ("mxfp4", 4, 32),
    ("affine", 2, 128),
    ("affine", 6, 64),
    ("f16", 16, 0),
]


@pytest.fixture(autouse=True)
def emulated(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def unpacking(*kind: Any) -> Any:
        words = gemm.unpacking_options(*kind)
        source = gemm.source("gemm_unpack")
        source = source[source.index("// Codes of a packed") :]
        block = cuda_block(source, gemm.THREADS, [*words, "-DUNPACK"], tmp_path)
        return lambda grid, _, *given: block.run(grid[0], *map(ctypes.byref, given))

    monkeypatch.setattr(gemm, "unpacking", unpacking)


def matrix(kind: tuple[str, int, int], rows: int, cols: int) -> QMatrix:
    fmt, bits, group = kind
    if fmt == "f16":
        return qmatrix.from_values(torch.randn(rows, cols).bfloat16())
    codes = torch.randint(0, 256, (rows, cols * bits // 8)).byte()
    if fmt != "affine":
        codes &= 0xBF if bits == 8 else 0xFF  # no NaN
        scales = torch.randint(120, 128, (rows, cols // 32)).byte()
        return qmatrix.assemble(fmt, bits, 32, (rows, cols), codes, scales)
    s = torch.randn(rows, cols // group)
    parts = [x.bfloat16().view(torch.uint8) for x in (s, -s * 2 ** (bits - 1))]
    return qmatrix.assemble(fmt, bits, group, (rows, cols), codes, *parts)


def difference(got: Tensor, want: Tensor) -> float:
    return float((got.double() - want).norm() / want.norm())


@pytest.mark.parametrize("kind", FORMATS, ids=str)
def test_unpacked_values_and_their_product(kind: tuple[str, int, int]) -> None:
    torch.manual_seed(1)
    m = matrix(kind, 39, 384)  # 468 threads: neither blocks nor warps are full
    want = qmatrix.dequantize(m)[0].double()
    values = dense.unpacked(m).double() * dense.unit(m)
    assert difference(values, want) < (1e-3 if kind[0] == "affine" else 1e-12)
    assert dense.unpacks(m, 5)
    x = torch.randn(5, 384).half()
    wide = torch.full((5, 60), float("nan"))
    dense.linears([m], x, [wide[:, 10:49]])
    assert difference(wide[:, 10:49], x.double() @ want.T) < 1e-3
    assert wide[:, :10].isnan().all()
    assert wide[:, 49:].isnan().all()


def test_groups_meet_their_own_inputs_and_saturate() -> None:
    torch.manual_seed(2)
    m = matrix(FORMATS[0], 32, 128)
    w = qmatrix.dequantize(m)[0].double().view(2, 16, 128)
    x = torch.randn(7, 256).half()
    for size in (0.01, 1.5e4):
        out = torch.full((7, 32), float("nan")).half()
        dense.grouped(m, x * size, out, groups=2)
        want = torch.einsum("tgi,goi->tgo", (x * size).double().view(7, 2, 128), w).flatten(1)
        assert difference(out, want.clamp(-dense.LARGEST, dense.LARGEST)) < 1e-3
    assert want.abs().max() > dense.LARGEST


def test_large_matrices_stay_packed_for_fewer_tokens() -> None:
    m = matrix(FORMATS[1], 32, 128)
    for rows, cols, tokens in ((32768, 1024, 1024), (4096, 8192, 512), (8192, 4096, 512)):
        large = replace(m, rows=rows, cols=cols)
        assert not dense.unpacks(large, tokens - 1)
        assert dense.unpacks(large, tokens)
    assert dense.unpacks(replace(m, rows=1024, cols=4096), 33)
