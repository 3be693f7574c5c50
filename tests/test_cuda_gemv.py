"""gemv.cu without a GPU: its threads run on the CPU, with tensor cores emulated."""

import ctypes
import functools
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="the kernels' package needs triton")
from ds4.backends.cuda import nvrtc, qmatrix
from ds4.backends.cuda.kernels import gemv
from ds4.backends.cuda.kernels.gemv_builds import TILE, Build, of_pairs
from ds4.backends.cuda.kernels.router import Tiles
from ds4.backends.cuda.qmatrix import QMatrix

from tests.cuda_block import cuda_block, spilled
from tests.sass import awaited_at_once
from tests.test_gemm import has_compiler, inspect

FORMATS = [
    ("f16", 16, 0),
    ("mxfp8", 8, 32),
    ("mxfp4", 4, 32),
    *[("affine", bits, 64) for bits in (2, 3, 4, 5, 6, 8)],
    *[("affine", bits, 128) for bits in (2, 8)],
]


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Build], ctypes.CDLL]:
    """The source compiled for the CPU, once for each build."""

    @functools.cache
    def library(build: Build) -> ctypes.CDLL:
        words = [*build.options, "-DEMULATED"]
        return cuda_block(gemv.source(), 256, words, tmp_path_factory.mktemp("gemv"))

    return library


@pytest.fixture(autouse=True)
def emulated(monkeypatch: pytest.MonkeyPatch, built: Callable[[Build], ctypes.CDLL]) -> None:
    """Launches run here instead, three blocks of threads being resident at once."""

    def kernel(name: str, build: Build) -> Any:
        def launch(grid: tuple[int, int, int], threads: int, *arguments: Any) -> None:
            assert threads == 256
            pointers = [ctypes.byref(argument) for argument in arguments]
            getattr(built(build), f"run_{name}")(grid[0], grid[1], *pointers)

        return launch

    monkeypatch.setattr(gemv, "_kernel", kernel)
    monkeypatch.setattr(gemv, "_resident_blocks", lambda: 3)


def random_matrix(
    fmt: str,
    bits: int,
    group: int,
    shape: tuple[int, int],
    rng: np.random.Generator,
    stack: int = 1,
) -> QMatrix:
    rows, cols = shape

    def bytes_of(x: np.ndarray) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(x).view(np.uint8))

    if fmt == "f16":
        values = torch.from_numpy(rng.standard_normal((stack, rows, cols), np.float32))
        return qmatrix.from_values((values * 1e-3).bfloat16())
    codes = rng.integers(0, 256, (stack, rows, cols * bits // 8), np.uint8)
    if fmt == "affine":
        grid = (stack, rows, cols // group)
        scales = torch.from_numpy(rng.random(grid, np.float32) * 0.02 + 1e-4).bfloat16()
        biases = (-scales.float() * 2 ** (bits - 1) * 1.1).bfloat16()
        parts = [x.view(torch.uint8) for x in (scales, biases)]
        return qmatrix.assemble(fmt, bits, group, shape, bytes_of(codes), *parts)
    if fmt == "mxfp8":
        codes = codes & 0xBF  # no NaN
    scales = rng.integers(110, 123, (stack, rows, cols // 32), np.uint8)
    return qmatrix.assemble(fmt, bits, 32, shape, bytes_of(codes), bytes_of(scales))


def near(got: Tensor, want: Tensor, tolerance: float) -> None:
    error = (got.double() - want).norm() / want.norm()
    assert error <= tolerance, f"relative error {error:.1e}"


def panel_of(x: Tensor) -> tuple[Tensor, Tensor]:
    """A panel whose unused columns are NaN, and the values that it holds."""
    return gemv.to_panel(x), x.half().double()


SHAPES = [((40, 1024), 3), *(((8, cols), 1) for cols in (8320, 576, 352))]
SHAPES += [((24, 640), 1), ((136, 2048), 1)]


@pytest.mark.parametrize(
    ("fmt", "bits", "group", "shape", "tokens"),
    [(*f, *s) for f in FORMATS for s in SHAPES if not f[2] or s[0][1] % f[2] == 0],
    ids=str,
)
def test_linear(fmt: str, bits: int, group: int, shape: tuple[int, int], tokens: int) -> None:
    """Rows that fill no tile, are longer than a warp's share, or no whole blocks."""
    rng = np.random.default_rng(0)
    m = random_matrix(fmt, bits, group, shape, rng)
    panel, x = panel_of(torch.from_numpy(rng.standard_normal((tokens, shape[1]), np.float32)))
    out = torch.full((tokens, shape[0] + 3), float("nan"))
    gemv.linears([gemv.Product(m, panel, out[:, : shape[0]])], tokens)
    want = x @ qmatrix.dequantize(m)[0].double().T
    near(out[:, : shape[0]], want, 3e-4 if fmt == "affine" else 2e-6)
    assert out[:, shape[0] :].isnan().all()


def test_many_matrices_in_one_launch_and_parts_of_one() -> None:
    """Different formats, inputs and outputs; rows of one matrix; many tokens."""
    rng, tokens = np.random.default_rng(1), 19
    wide = random_matrix("mxfp8", 8, 32, (64, 256), rng)
    tall = random_matrix("mxfp4", 4, 32, (72, 1024), rng)
    a, x = panel_of(torch.from_numpy(rng.standard_normal((tokens, 256), np.float32)))
    b, y = panel_of(torch.from_numpy(rng.standard_normal((tokens, 1024), np.float32) * 100))
    out, half = torch.empty(tokens, 72), gemv.panel(32, tokens, "cpu").fill_(float("nan"))
    gemv.linears([gemv.Product(tall, b, out), gemv.Product(wide, a, half, 16, 32)], tokens)
    near(out, y @ qmatrix.dequantize(tall)[0].double().T, 2e-6)
    got = half[:, :tokens].transpose(0, 1).reshape(tokens, 32)
    near(got, x @ qmatrix.dequantize(wide)[0, 16:48].double().T, 1e-3)


def test_a_token_does_not_notice_its_neighbours() -> None:
    rng = np.random.default_rng(2)
    m = random_matrix("mxfp4", 4, 32, (48, 1024), rng)
    x = torch.from_numpy(rng.standard_normal((8, 1024), np.float32))
    together, two, alone = torch.empty(8, 48), torch.empty(2, 48), torch.empty(1, 48)
    gemv.linears([gemv.Product(m, gemv.to_panel(x), together)], 8)
    gemv.linears([gemv.Product(m, gemv.to_panel(x[4:6]), two)], 2)
    gemv.linears([gemv.Product(m, gemv.to_panel(x[5:6]), alone)], 1)
    assert torch.equal(together[5], two[1])
    near(together[5:6], alone.double(), 1e-6)  # the sums of one token have another order


@pytest.mark.parametrize("tokens", [1, 2, 5, 11])
@pytest.mark.parametrize("routed", [("mxfp4", 4, 32), ("affine", 2, 64)], ids=str)
def test_experts(
    routed: tuple[str, int, int], tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Shared tiles beside routed ones, an expert twice for a token, clamped values."""
    monkeypatch.setattr(gemv, "_resident_blocks", lambda: 11)
    rng, experts, width, hidden, picks, limit = np.random.default_rng(3), 5, 256, 128, 3, 1.5
    shapes = (hidden, width), (hidden, width), (width, hidden)
    chosen = [random_matrix(*routed, shape, rng, experts) for shape in shapes]
    shared = [random_matrix("mxfp8", 8, 32, shape, rng) for shape in shapes]
    panel, x = panel_of(torch.from_numpy(rng.standard_normal((tokens, width), np.float32)))
    ids = rng.integers(0, experts, (tokens, picks))
    if tokens == 2:
        ids[:] = 4  # more pairs of an expert than a block takes at a time
    weights = torch.from_numpy(rng.random((tokens, picks), np.float32))
    router = random_matrix("f16", 16, 0, (40, width), rng)
    todo = gemv.Experts(tuple(chosen), tuple(shared), panel, (tokens, picks), limit)
    scores = torch.full((tokens, 40), float("nan"))
    todo.begin(gemv.Product(router, panel, scores))
    near(scores, x @ qmatrix.dequantize(router)[0].double().T, 2e-6)
    of_chosen, of_shared = todo.finish(tiles_of(ids), weights)

    def expert(matrices: list[Tensor], x: Tensor, weight: float) -> Tensor:
        w1, w3, w2 = matrices
        gate, up = (x @ w1.T).clamp(max=limit), (x @ w3.T).clamp(-limit, limit)
        return (torch.nn.functional.silu(gate) * up * weight) @ w2.T

    each = [qmatrix.dequantize(m).double() for m in chosen]
    want = expert([qmatrix.dequantize(m)[0].double() for m in shared], x, 1)
    for t, picked in enumerate(ids):
        for e, weight in zip(picked, weights[t].tolist(), strict=True):
            want[t] += expert([m[e] for m in each], x[t], weight)
    near(of_chosen.sum(1) + of_shared, want, 1e-3)
    if tokens < 11:  # as experts that may have been copied
        again = of_chosen.clone(), of_shared.clone()
        todo = gemv.Experts(
            tuple(chosen), tuple(shared), panel, (tokens, picks), limit, placed=True
        )
        todo.begin(gemv.Product(router, panel, scores.fill_(float("nan"))))
        flags = [np.ones(experts, np.int32) for _ in range(2)]
        copies = gemv.Copies(*(x.ctypes.data for x in flags))
        found = todo.finish(tiles_of(ids), weights, copies)
        assert all(map(torch.equal, found, again))
        assert scores.isfinite().all()
    company = 1 if tokens == 1 else 2  # alone the chosen get the same to the bit, others but nearly
    for t, some in ((t, s) for t in range(tokens) for s in {1, company}):
        mine = [t, *range(some - 1)]
        part, score = gemv.to_panel(x[mine].float()), torch.empty(some, 40)
        todo = gemv.Experts(tuple(chosen), tuple(shared), part, (some, picks), limit)
        todo.begin(gemv.Product(router, part, score))
        found = todo.finish(tiles_of(ids[mine]), weights[mine].contiguous())
        assert torch.equal(found[0][0], of_chosen[t])
        if some == company:
            assert torch.equal(found[1][0], of_shared[t])
            assert torch.equal(score[0], scores[t])
        near(found[1][:1], of_shared[t : t + 1].double(), 1e-3)
        near(score[:1], scores[t : t + 1].double(), 2e-6)
    apart = torch.empty_like(scores)
    gemv.linears([gemv.Product(router, panel, apart)], tokens)
    assert torch.equal(apart, scores)
    if tokens != 5:
        return
    total = torch.zeros_like(of_shared)
    for rank, held in enumerate(([0, 3], [1, 2, 4])):  # as two ranks share them
        mine = [qmatrix.renumbered(stack_of(m, held), held, experts) for m in chosen]
        todo = gemv.Experts(
            tuple(mine), tuple(shared), panel, (tokens, picks), limit, ranks=2, has_shared=not rank
        )
        todo.begin(gemv.Product(router, panel, scores.fill_(float("nan"))))
        near(scores, x @ qmatrix.dequantize(router)[0].double().T, 2e-6)
        of_chosen, of_shared = todo.finish(tiles_of(ids, held), weights)
        here = torch.from_numpy(np.isin(ids, held))[:, :, None]
        total += torch.where(here, of_chosen, 0).sum(1) + (0 if rank else of_shared)
    near(total, want, 1e-3)


def stack_of(m: QMatrix, ids: list[int]) -> QMatrix:
    """Some matrices of a stack, in memory of their own."""
    blob = m.blob[ids].clone()
    ptrs = torch.arange(len(ids)) * blob.shape[1] + blob.data_ptr()
    return replace(m, blob=blob, ptrs=ptrs, address=blob.data_ptr())


def tiles_of(ids: np.ndarray, held: Sequence[int] | None = None) -> Tiles:
    """The work of a step; of the experts `held`, if those of others are not here."""
    most, holds = ids.size, 1 if len(ids) == 1 else TILE
    pairs = [(e, i) for i, e in enumerate(ids.reshape(-1)) if held is None or e in held]
    expert, count = np.zeros(most, np.int32), np.zeros(most, np.int32)
    each = np.full((most, 8), -999, np.int32)
    tile = -1
    for e, pair in sorted(pairs):
        if tile < 0 or expert[tile] != e or count[tile] == holds:
            tile += 1
            expert[tile] = e
        each[tile, count[tile]] = pair
        count[tile] += 1
    return Tiles(*(torch.from_numpy(x) for x in (expert, count, each)))


@pytest.mark.parametrize("arch", [90, 120])
def test_one_token_of_the_native_formats_needs_no_more_registers_than_there_are(
    arch: int, tmp_path: Path
) -> None:
    rng = np.random.default_rng(6)
    formats = ("f16", 16, 0), ("mxfp8", 8, 32), ("mxfp4", 4, 32)
    build = of_pairs([random_matrix(*f, (8, 1024), rng) for f in formats], 1)
    assert not spilled(gemv.source(), ["-std=c++17", *build.options], arch, tmp_path)


@has_compiler
@pytest.mark.parametrize("fmt", [("mxfp4", 4, 32), ("affine", 2, 64)], ids=str)
def test_nobody_waits_for_what_was_just_asked_for(
    fmt: tuple[str, int, int], tmp_path: Path
) -> None:
    """Scales of two groups come together; taken apart at once they would stop the warp."""
    build = of_pairs([random_matrix(*fmt, (8, 1024), np.random.default_rng(7))], 1)
    options = "--gpu-architecture=sm_90a", *build.options, "-DKERNEL=gate_up"
    sass = inspect(nvrtc.compile(gemv.source(), options), "cuobjdump", "-sass", tmp_path)
    assert not awaited_at_once(sass)
