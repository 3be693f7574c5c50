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
from ds4.backends.cuda import nvrtc
from ds4.backends.cuda.kernels import gemm, gemm_clusters
from ds4.backends.cuda.kernels.gemm_clusters import Build, Tiles

from tests.cuda_block import cuda_block
from tests.sass import overwritten_operands


@pytest.fixture
def emulated(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def helper(name: str, tokens: int) -> Any:
        words = Build("mxfp4", 4, 32, False, tokens).options()
        source = gemm.read("gemm_codes", "gemm_tiles")
        block = cuda_block(source, gemm.THREADS, [*words, "-DTILES"], tmp_path)
        run = getattr(block, f"run_{name}")
        sizes = 1 if name == "plan_tiles" else 2
        return lambda grid, _, *given: run(*grid[:sizes], *map(ctypes.byref, given))

    monkeypatch.setattr(gemm_clusters, "_helper", helper)


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


@pytest.mark.skipif(sys.platform != "linux", reason="NVRTC is for Linux")
@pytest.mark.parametrize("tokens", gemm_clusters.SIZES)
@pytest.mark.parametrize("kind", [("mxfp4", 4, 32), ("affine", 2, 128)], ids=str)
def test_loops_spill_nothing_and_keep_their_operands(
    kind: tuple[str, int, int], tokens: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    largest = gemm_clusters.SIZES[tokens][-1]
    monkeypatch.setitem(gemm_clusters.SIZES, tokens, (largest,))
    options = ["--gpu-architecture=sm_90a", *Build(*kind, True, tokens).options()]
    code = tmp_path / "code.cubin"
    code.write_bytes(nvrtc.compile(gemm_clusters.source(), options))
    tool = f"{pytest.importorskip('triton.backends.nvidia').__path__[0]}/bin/nvdisasm"
    sass = subprocess.run([tool, "-c", code], capture_output=True, text=True).stdout
    assert f"HGMMA.64x{largest}x16" in sass
    assert not overwritten_operands(sass, "experts")
    loops = re.findall(r"(?:HGMMA(?:.*\n)+?.*BRA)", sass)
    assert loops
    assert not re.search(r"\b(LDL|STL)\b", sass[sass.index("HGMMA") : sass.rindex("HGMMA")])
