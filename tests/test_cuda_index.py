"""The indexer of the CUDA backend: its queries, and scores of packed rows."""

import ctypes
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ds4.backend import CacheMode, open_backend
from ds4.step import Chunk, plan

triton = pytest.importorskip("triton")
from ds4.backends.cuda.kernels import index, remember  # noqa: E402

from tests.cuda_block import cuda_block  # noqa: E402
from tests.test_cuda_rows import IC, alloc  # noqa: E402

f32 = np.float32
T = torch.from_numpy


@pytest.mark.parametrize(("width", "heads"), [(128, 9), (64, 3), (32, 1)])
def test_queries_are_the_reference_s(width: int, heads: int, tmp_path: Path) -> None:
    """Two warps of eight heads each, at positions near and far; the rest of 16 heads is zero."""
    block = cuda_block(index.source(), 64, index.options(width), tmp_path)
    rng = np.random.default_rng(width)
    wide = rng.standard_normal((3, heads * width + 16)) * np.exp(3 * rng.standard_normal((3, 1)))
    wide = wide.astype(f32)
    wide[2, :width] = 0
    weights, pos = rng.standard_normal((3, heads + 1)).astype(f32), np.array([5, 999_999, 0], "i4")
    freqs = (1 / 160000 ** (np.arange(0, 32, 2) / 32)).astype(f32)
    query, share = np.full((3, 16, width), np.nan, np.float16), np.full((3, 16), np.nan, f32)
    arrays = [ctypes.c_void_p(x.ctypes.data) for x in (wide, weights, pos, freqs, query, share)]
    block.run(1, 3, *arrays, wide.shape[1], heads + 1, heads, 16, 32, 8)

    assert not share[:, heads:].any()
    power = (share[:, :heads] / weights[:, :heads])[..., None]
    got = np.stack(np.split(query[:, :heads].astype(f32), 2, -1), -1).reshape(3, heads, width)
    reference: Any = open_backend("reference", cache="native")
    q = wide[:, : heads * width].reshape(3, heads, width)
    want = reference._rounded(reference.alloc("index", 1, 1, width), reference._rope(q, pos, freqs))
    flipped = np.abs(got * power - want) > 1e-5 * np.abs(want).max(-1, keepdims=True)
    assert flipped.mean() < 2e-3  # of few values, float32's last bits decide


@pytest.mark.interpret
@pytest.mark.filterwarnings("ignore:invalid value")  # memory that was never written
@pytest.mark.parametrize("few", [True, False])
@pytest.mark.parametrize(("mode", "heads"), [("native", 16), ("native", 3), ("exact", 2)])
def test_scores_are_the_reference_s(
    mode: CacheMode, heads: int, few: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(index, "FEW", 32 if few else 0)
    rng = np.random.default_rng(heads)
    pool = alloc("index", 3, 90, IC, mode)
    chunks = [Chunk(1, 300, [0] * 9), Chunk(0, 170, [0, 0]), Chunk(2, 10, [0])]
    for slot, start, tokens in chunks:
        n = (start + len(tokens)) // 4
        x = rng.standard_normal((n, IC)) * np.exp(2 * rng.standard_normal((n, 1)))
        at = torch.arange(n, dtype=torch.int32)
        remember.write(pool, T(x.astype(f32)), torch.full_like(at, slot), at)
    step = plan(chunks, [4], pad_to=14)
    slot, pos = T(step.slot), T(step.pos)
    wide = 3 * rng.standard_normal((14, heads * (IC + 1) + 5)).astype(f32)
    q, weights, _ = np.split(wide, [heads * IC, heads * (IC + 1)], 1)
    freqs = (1 / 10000 ** (np.arange(0, 32, 2) / 32)).astype(f32)
    reference: Any = open_backend("reference", cache=mode)
    rows = reference.alloc("index", 1, 1, IC)
    rotated = reference._rope(q.reshape(14, heads, IC), step.pos, freqs)
    q = reference._rounded(rows, rotated)
    if mode == "native":
        query, share = (T(x) for x in prepared(q, weights))
    else:
        columns = T(wide)[:, : heads * (IC + 1)].split([heads * IC, heads], 1)
        by_head = columns[0].unflatten(1, (heads, IC))
        query, share = index.prepare(by_head, columns[1], pos, T(freqs), False)
        np.testing.assert_allclose(query[:, :heads], rotated, atol=1e-5)
    scores = torch.full((14, 128), torch.nan)
    index.score(query, share, pool, slot, pos, 90, 4, 8, scores)
    for t in range(14):
        seen = (step.pos[t] + 1) // 4
        assert scores[t, seen:].isnan().all()
        if seen > 8:
            keys = pool.float32(step.slot[t], 0, seen).numpy().astype(np.float64)
            want = weights[t] @ np.maximum(q[t] @ keys.T, 0)
            np.testing.assert_allclose(scores[t, :seen], want, atol=1e-6 * np.abs(want).max())


def prepared(q: np.ndarray, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Rounded queries (T, N, C) as index.prepare leaves them."""
    pad = -q.shape[1] % 16
    q, weights = np.pad(q, [(0, 0), (0, pad), (0, 0)]), np.pad(weights, [(0, 0), (0, pad)])
    power = np.frexp(np.abs(q).max(-1))[1] - 2
    relative = np.ldexp(q, -power[..., None])
    halves = np.concatenate([relative[..., ::2], relative[..., 1::2]], -1).astype(np.float16)
    return halves, np.ldexp(weights, power)


@pytest.mark.interpret
def test_few_entries_are_all_chosen() -> None:
    step = plan([Chunk(0, 2, [0, 0, 0, 0])], [], pad_to=5)
    q, weights = torch.full((5, 2, IC), torch.nan), torch.full((5, 2), torch.nan)
    pool, freqs = alloc("index", 1, 3, IC, "native"), torch.zeros(2)
    slot, pos = T(step.slot), T(step.pos)
    ids = index.index(q, weights, pool, slot, pos, step.span, freqs, 4, 6)
    assert ids.tolist() == [[-1, -1, -1], *[[0, -1, -1]] * 3, [-1, -1, -1]]


@pytest.mark.parametrize("arch", [90, 120])
def test_scores_compile_to_tensor_cores_without_spills(arch: int) -> None:
    from tests.triton_compile import compile_kernel

    pointers = {"query": "*fp16", "share": "*fp32", "codes": "*u8", "scales": "*u8"}
    pointers |= {"slots": "*i32", "positions": "*i32", "scores": "*fp32"}
    sizes = dict.fromkeys(["pool_size", "tokens", "entries", "k", "scores_stride"], "i32:16")
    constants = {"HEADS": 64, "C": 128, "RATIO": 4, "ASM": True, "PDL": True}
    tokens, block, warps, stages = index.MANY_TILE
    many = constants | {"TB": tokens, "EB": block, "NATIVE": True}
    reports = [compile_kernel(index.score_many, pointers | sizes, many, arch, warps, stages)]
    block, warps, stages, _ = index.FEW_TILE
    few = constants | {"EB": block, "STAGES": stages}
    del sizes["tokens"]
    reports += [compile_kernel(index.score_few, pointers | sizes, few, arch, warps)]
    for report in reports:
        assert report.spills == 0
        assert report.loads[16] >= 8
        assert report.count(r"wgmma\.mma_async" if arch == 90 else r"mma\.sync") >= 8
