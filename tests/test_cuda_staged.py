"""gemv_staged.cu without a GPU: the bits of gemv.cu, however matrices are cut up."""

import ctypes
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="the kernels' package needs triton")
from ds4.backends.cuda import qmatrix
from ds4.backends.cuda.kernels import gemv, gemv_staged
from ds4.backends.cuda.kernels.gemv_builds import Build
from ds4.backends.cuda.qmatrix import QMatrix

from tests.cuda_block import cuda_block, spilled
from tests.test_cuda_gemv import near, panel_of, random_matrix

F16, FP8, FP4 = ("f16", 16, 0), ("mxfp8", 8, 32), ("mxfp4", 4, 32)
A2, A6 = ("affine", 2, 128), ("affine", 6, 64)
KB = 1024


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., ctypes.CDLL]:
    """A source compiled for the CPU, once for each set of options."""

    @functools.cache
    def library(source: str, options: tuple[str, ...], threads: int = 256) -> ctypes.CDLL:
        words = [*options, "-DEMULATED", f"-DSHARED={227 * KB}"]
        return cuda_block(source, threads, words, tmp_path_factory.mktemp("staged"))

    return library


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch, compiled: Callable[..., ctypes.CDLL]) -> Any:
    """`gpu(processors, shared)`: launches run here, on a GPU of that size; gives the launches."""
    launches: list[tuple[int, int]] = []

    def run(library: ctypes.CDLL, grid: tuple[int, int, int], arguments: Any) -> None:
        library.run_linears(grid[0], grid[1], *(ctypes.byref(one) for one in arguments))

    def few(name: str, build: Build) -> Any:
        return lambda grid, threads, *arguments: run(
            compiled(gemv.source(), build.options), grid, arguments
        )

    def staged(options: tuple[str, ...], shared: int) -> Any:
        def launch(grid: tuple[int, int, int], threads: int, *arguments: Any) -> None:
            launches.append((grid[0], shared))
            run(compiled(gemv_staged.source(), options, threads), grid, arguments)

        return launch

    def of_size(processors: int, shared: int = 227 * KB) -> list[tuple[int, int]]:
        monkeypatch.setattr(gemv_staged, "_processors", lambda: processors)
        monkeypatch.setattr(gemv_staged, "_most_shared", lambda: shared)
        return launches

    monkeypatch.setattr(gemv, "_kernel", few)
    monkeypatch.setattr(gemv, "_resident_blocks", lambda: 3)
    monkeypatch.setattr(gemv_staged, "_kernel", staged)
    return of_size


CASES = [  # matrices (format, rows), channels, tokens, processors, KB of shared memory
    ("two parts a warp", [(FP8, 72)], 4096, 9, 1, 227),
    ("rows in two blocks' turns, fp16 results", [(FP8, 200)], 4096, 19, 2, 227),
    ("pairs of blocks share rows", [(FP8, 136)], 8192, 32, 8, 227),
    ("the same, little shared memory", [(FP8, 72)], 8192, 25, 8, 99),
    ("x stays for all sets of rows", [(FP8, 392)], 1024, 32, 2, 99),
    ("several formats, in halves", [(FP8, 72), (F16, 40)], 4096, 32, 8, 227),
    ("several formats, whole", [(FP4, 136), (F16, 40)], 2048, 17, 1, 227),
    ("affine", [(A6, 72), (A2, 40)], 2048, 20, 2, 227),
]


@pytest.mark.parametrize(("what", "parts", "cols", "tokens", "processors", "shared"), CASES)
def test_a_token_gets_the_bits_that_gemv_gives(
    gpu: Any, what: str, parts: Any, cols: int, tokens: int, processors: int, shared: int
) -> None:
    rng = np.random.default_rng(0)
    launches = gpu(processors, shared * KB)
    ms = [random_matrix(*fmt, (rows, cols), rng) for fmt, rows in parts]
    panel, x = panel_of(torch.from_numpy(rng.standard_normal((tokens, cols), np.float32)))
    halves = gemv_staged.Halves("cpu")
    results = []
    for run in (
        lambda products: gemv.linears(products, tokens),
        lambda products: gemv_staged.linears(products, tokens, halves),
    ):
        outs = [_nothing(m, tokens, "fp16" in what) for m in ms]
        run([gemv.Product(m, panel, out[..., : m.rows]) for m, out in zip(ms, outs, strict=True)])
        results.append(outs)
    assert len(launches) == 1
    assert not halves.done.any()
    for m, want, got in zip(ms, *results, strict=True):
        if got.dtype == torch.float16:
            want, got = (t[:, :tokens].transpose(0, 1).reshape(tokens, -1) for t in (want, got))
        else:
            assert got[:, m.rows :].isnan().all()
            want, got = want[:, : m.rows], got[:, : m.rows]
        assert torch.equal(want, got)
        near(got, x @ qmatrix.dequantize(m)[0].double().T, 3e-4)


def _nothing(m: QMatrix, tokens: int, half: bool) -> Tensor:
    """Where results go: a panel, or rows with room beside them."""
    if half:
        return gemv.panel(m.rows, tokens, "cpu").fill_(float("nan"))
    return torch.full((tokens, m.rows + 8), float("nan"))


def test_parts_of_a_matrix_with_inputs_of_their_own(gpu: Any) -> None:
    """As wo_a: rows of group g meet the channels of group g."""
    gpu(132)
    rng, tokens = np.random.default_rng(1), 12
    m = random_matrix(*FP8, (128, 1024), rng)
    panel, x = panel_of(torch.from_numpy(rng.standard_normal((tokens, 2048), np.float32)))
    out = gemv.panel(128, tokens, "cpu").fill_(float("nan"))
    ins, outs = panel.chunk(2), out.chunk(2)
    products = [gemv.Product(m, ins[g], outs[g], 64 * g, 64) for g in range(2)]
    assert gemv_staged.linears(products, tokens, gemv_staged.Halves("cpu"))
    got = out[:, :tokens].transpose(0, 1).reshape(tokens, -1)
    values = qmatrix.dequantize(m)[0].double()
    near(got, torch.cat([x[:, :1024] @ values[:64].T, x[:, 1024:] @ values[64:].T], 1), 1e-3)


def test_what_does_not_suit_is_left_to_gemv(gpu: Any) -> None:
    """Up to 8 tokens, short rows, rows of no whole blocks; nothing is written."""
    launches = gpu(132)
    rng, halves = np.random.default_rng(2), gemv_staged.Halves("cpu")
    for cols, tokens in ((1024, 8), (512, 9), (1024 + 64, 9)):
        m = random_matrix(*FP8, (8, cols), rng)
        panel, _ = panel_of(torch.zeros(tokens, cols))
        product = gemv.Product(m, panel, torch.empty(tokens, 8))
        assert not gemv_staged.linears([product], tokens, halves)
    assert not launches


@pytest.mark.parametrize("arch", [80, 90, 120])
def test_the_native_formats_need_no_more_registers_than_there_are(
    arch: int, tmp_path: Path
) -> None:
    rng = np.random.default_rng(3)
    options = gemv_staged.options([random_matrix(*f, (8, 1024), rng) for f in (FP8, F16)], 32, 4)
    assert not spilled(gemv_staged.source(), ["-std=c++17", *options], arch, tmp_path)
