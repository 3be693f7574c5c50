"""The choice of the best entries: topk.cu run on the CPU, thread by thread, against a sort."""

import ctypes
import shutil
from pathlib import Path

import numpy as np
import pytest

from ds4.errors import BackendError
from tests.cuda_block import cuda_block, spilled

topk = pytest.importorskip("ds4.backends.cuda.kernels.topk")

f32 = np.float32
ENTRIES = 512  # 64 threads of 8 scores


@pytest.fixture(scope="module")
def block(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    return cuda_block(topk.source(), 64, topk.options(64, 8), tmp_path_factory.mktemp("topk"))


def scores() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    normal = rng.standard_normal((4, ENTRIES)).astype(f32)
    odd = normal.copy()
    odd[:, ::3] = -np.inf
    odd[0, 5], odd[1, 7] = np.inf, np.nan
    return {
        "normal": normal,
        "ties": np.round(2 * normal),
        "zeros of both signs": np.where(normal > 0, f32(0), f32(-0.0)),
        "infinite": odd,
        "mostly never": np.where(normal < 1.5, f32(-np.inf), f32(1)),
        "of all sizes": normal * f32(10) ** rng.integers(-30, 30, normal.shape).astype(f32),
        "tiny": normal * f32(1e-42),
        "one far away": np.where(np.arange(ENTRIES) == 9, f32(1e30), normal),
    }


@pytest.mark.parametrize("k", [90, 5])
@pytest.mark.parametrize("kind", scores())
def test_the_k_largest(block: ctypes.CDLL, kind: str, k: int) -> None:
    """Of the whole row, and of its four segments first: k may exceed the number of threads."""
    visible = np.array([ENTRIES, 301, k + 1, k])
    row = scores()[kind]
    clean = np.where(np.isnan(row), -np.inf, row)
    want = [
        np.sort(np.argsort(-x[:n], kind="stable")[:k]) for x, n in zip(clean, visible, strict=True)
    ]
    hidden = np.where(np.arange(ENTRIES) < visible[:, None], row, f32(np.nan)).astype(f32)
    pos = (4 * visible - 1 + [0, 1, 2, 3]).astype(np.int32)

    ids = np.full((4, k), -9, np.int32)
    run(block, topk.WHOLE, 1, hidden, ids, pos, hidden, ids, k)
    np.testing.assert_array_equal(ids, want)

    each = 4 * k
    kept, names = np.full((4, each), np.nan, f32), np.full((4, each), -9, np.int32)
    merged = np.full((4, k), -9, np.int32)
    run(block, topk.SEGMENT, 4, hidden, ids, pos, kept, names, k)
    run(block, topk.MERGE, 1, kept, names, pos, kept, merged, k)
    np.testing.assert_array_equal(merged, want)


def test_fewer_than_k(block: ctypes.CDLL) -> None:
    row, ids = np.full((3, ENTRIES), np.nan, f32), np.full((3, 5), -9, np.int32)
    for use in (topk.WHOLE, topk.MERGE):
        run(block, use, 1, row, ids, np.array([-1, 12, 2], np.int32), row, ids, 5)
        assert ids.tolist() == [[-1] * 5, [0, 1, 2, -1, -1], [-1] * 5]


def run(
    block: ctypes.CDLL,
    use: int,
    segments: int,
    scores: np.ndarray,
    names: np.ndarray,
    pos: np.ndarray,
    kept: np.ndarray,
    ids: np.ndarray,
    k: int,
) -> None:
    arrays = [ctypes.c_void_p(x.ctypes.data) for x in (scores, names, pos, kept, ids)]
    sizes = use, 4, ENTRIES, k, ENTRIES // 4, scores.shape[1], ids.shape[1]
    block.run(segments, len(pos), *arrays, *sizes)


def test_rows_of_every_length_are_served() -> None:
    for context in (8, 2048, 131072, 1 << 20):
        for k in (512, 1024):
            segment = topk.segment_of(context // 4, k)
            longest = max(segment, -(-context // 4 // segment) * k) if segment else context // 4
            for rows in (1, 8192):
                threads, values = topk.block_of(longest, rows)
                assert values <= 16
                assert longest <= threads * values
    with pytest.raises(BackendError, match="shorten the context"):
        topk.segment_of(1 << 22, 1024)
    with pytest.raises(BackendError):
        topk.segment_of(40000, 9000)


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc")
@pytest.mark.parametrize("arch", [90, 120])
def test_nothing_spills(arch: int, tmp_path: Path) -> None:
    for threads in (512, 1024):
        assert not spilled(topk.source(), topk.options(threads, 16), arch, tmp_path)
