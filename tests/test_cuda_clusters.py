"""gemm_clusters.py without a GPU: tiles made on the CPU, the products compiled for Hopper."""

import ctypes
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="the kernels' package needs triton")
from ds4.backends.cuda import nvrtc, qmatrix
from ds4.backends.cuda.kernels import gemm, gemm_clusters
from ds4.backends.cuda.kernels.gemm_clusters import Build, Tiles

from tests.cuda_block import cuda_block
from tests.sass import overwritten_operands


@pytest.fixture
def emulated(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def folder(name: str) -> Path:
        (tmp_path / name).mkdir(exist_ok=True)
        return tmp_path / name

    def helper(name: str, tokens: int, device: Any) -> Any:
        words = Build("mxfp4", 4, 32, False, tokens).options()
        source = gemm.read("gemm_codes", "gemm_tiles")
        block = cuda_block(source, gemm.THREADS, [*words, "-DFILLED"], folder(name))
        run = getattr(block, f"run_{name}")
        sizes = 1 if name == "plan_tiles" else 2
        return lambda grid, _, *given: run(*grid[:sizes], *map(ctypes.byref, given))

    def kernel(build: Build, device: Any) -> Any:
        source = gemm.read("gemm_codes", "gemm_clusters_codes", "gemm_clusters")
        source = source.replace("extern __shared__ u8 unaligned[];", "static u8 unaligned[1];")
        block = cuda_block(
            source, 0, build.options(), folder("gated" * build.gated), "cuda_cluster.cpp"
        )
        return lambda grid, threads, *given: block.run(*map(ctypes.byref, given))

    monkeypatch.setattr(gemm_clusters, "_helper", helper)
    monkeypatch.setattr(gemm_clusters, "_kernel", kernel)
    monkeypatch.setattr(gemm, "chip", lambda _: gemm.Chip(True, 2, 228 << 10))
    monkeypatch.setitem(gemm_clusters.SIZES, 64, (16, 24))


@pytest.mark.parametrize("counts", [[300, 0, 40, 1, 0, 129], [0, 0, 3, 0, 5, 4]], ids=str)
def test_every_pair_has_a_row_of_its_expert(counts: list[int], emulated: None) -> None:
    torch.manual_seed(1)
    choices, width, count = 2, 256, sum(counts)
    x = torch.randn(count // choices, width + 128).half()[:, :width]
    order = torch.randperm(count).int()
    offsets = torch.tensor([0, *counts]).cumsum(0).int()
    weights = torch.rand(count)
    tiles = Tiles.of(gemm.Routed(order, offsets, weights, choices), len(counts))
    filled = torch.full((tiles.rows(), width), 7.0).half()
    tiles.fill(x, filled)
    made = tiles.tiles[1 : 1 + tiles.tiles[0, 0]]
    assert len(made) == sum(-(-n // tiles.tokens) for n in counts)
    met, free = [], 0
    for expert, first, size, _ in made.tolist():
        assert first == free
        free += size
        pairs = tiles.pairs[first : first + size]
        real = pairs[pairs >= 0]
        mine = order[offsets[expert] : offsets[expert + 1]].tolist()
        assert set(real.tolist()) <= set(mine)
        met += real.tolist()
        assert torch.equal(tiles.shares[first : first + size][pairs >= 0], weights[real.long()])
        runs = filled[first : first + size].flatten().view(width // 64, size, 8, 8)
        for i in range(len(real)):
            mixed = runs[:, i, torch.arange(8) ^ i % 8].flatten()
            assert torch.equal(mixed, x[int(real[i]) // choices])
    assert sorted(met) == list(range(count))
    assert free == tiles.tiles[0, 1] <= tiles.rows()


def matrix(kind: tuple[str, int, int], stack: int, rows: int, cols: int) -> qmatrix.QMatrix:
    fmt, bits, group = kind
    codes = torch.randint(0, 256, (stack, rows, cols * bits // 8)).byte()
    if fmt != "affine":
        codes &= 0xBF if bits == 8 else 0xFF  # no NaN
        scales = torch.randint(120, 124, (stack, rows, cols // 32)).byte()
        return qmatrix.assemble(fmt, bits, 32, (rows, cols), codes, scales)
    s = torch.randn(stack, rows, cols // group) / 8
    parts = [x.bfloat16().view(torch.uint8) for x in (s, -s * 2 ** (bits - 1))]
    return qmatrix.assemble(fmt, bits, group, (rows, cols), codes, *parts)


@pytest.mark.parametrize(
    ("kinds", "warps"),
    [((("mxfp4", 4, 32), ("affine", 2, 128)), 16), ((("affine", 3, 64), ("mxfp8", 8, 32)), 8)],
    ids=str,
)
def test_experts(
    kinds: tuple[Any, Any], warps: int, emulated: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gemm_clusters, "_warps", lambda _: warps)
    torch.manual_seed(1)
    tokens, choices, experts, limit, width, hidden = 20, 2, 3, 1.5, 512, 256
    w1, w3 = (matrix(kinds[0], experts, hidden, width) for _ in range(2))
    w2 = matrix(kinds[1], experts, width, hidden)
    ids = torch.tensor([[0, 2]] * 19 + [[2, 2]])
    x = (torch.randn(tokens, width) / 16).half()
    plan = gemm.Routed(
        ids.flatten().argsort(stable=True).int(),
        torch.tensor([0, 19, 19, 40]).int(),
        torch.rand(tokens * choices),
        choices,
    )
    got = gemm_clusters.each_expert((w1, w3, w2), permuted(x, w1), plan, limit)
    a, b, c = (qmatrix.dequantize(m).double() for m in (w1, w3, w2))
    for pair, expert in enumerate(ids.flatten().tolist()):
        row = x[pair // choices].double()
        gate = torch.nn.functional.silu((a[expert] @ row).clamp(max=limit))
        want = c[expert] @ (gate * (b[expert] @ row).clamp(-limit, limit) * plan.weights[pair])
        assert (got[pair] - want).norm() < 1e-3 * want.norm()


def permuted(x: torch.Tensor, m: qmatrix.QMatrix) -> torch.Tensor:
    """As gemm.permute."""
    apart = gemm.spread(m)
    runs = x.view(len(x), -1, 4, 16 // apart, 2, apart)  # lane, pairs, half of a pair
    return runs.permute(0, 1, 3, 5, 2, 4).reshape(x.shape).contiguous()


@pytest.mark.skipif(sys.platform != "linux", reason="NVRTC is for Linux")
@pytest.mark.parametrize("tokens", gemm_clusters.SIZES)
@pytest.mark.parametrize("kind", [("mxfp4", 4, 32), ("affine", 2, 128)], ids=str)
def test_loops_spill_nothing_and_keep_their_operands(
    kind: tuple[str, int, int], tokens: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    largest = gemm_clusters.SIZES[tokens][-1]
    monkeypatch.setitem(gemm_clusters.SIZES, tokens, (largest,))
    monkeypatch.setattr(gemm_clusters, "source", gemm_clusters.source.__wrapped__)
    options = ["--gpu-architecture=sm_90a", *Build(*kind, True, tokens).options()]
    code = tmp_path / "code.cubin"
    code.write_bytes(nvrtc.compile(gemm_clusters.source(tokens), options))
    tool = f"{pytest.importorskip('triton.backends.nvidia').__path__[0]}/bin/nvdisasm"
    sass = subprocess.run([tool, "-c", code], capture_output=True, text=True).stdout
    assert f"HGMMA.64x{largest}x16" in sass
    assert not overwritten_operands(sass, "experts")
    loops = re.findall(r"(?:HGMMA(?:.*\n)+?.*BRA)", sass)
    assert loops
    assert not re.search(r"\b(LDL|STL)\b", sass[sass.index("HGMMA") : sass.rindex("HGMMA")])


def test_experts_that_nobody_chose(emulated: None) -> None:
    kind = "mxfp4", 4, 32
    w1, w2 = matrix(kind, 2, 256, 512), matrix(kind, 2, 512, 256)
    nobody = torch.zeros(3).int()
    plan = gemm.Routed(torch.arange(4).int(), nobody, torch.rand(4), 2)
    got = gemm_clusters.each_expert((w1, w1, w2), torch.zeros(2, 512).half(), plan, 1.0)
    assert got.shape == (4, 512)
