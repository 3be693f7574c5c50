"""Numbers worked out by hand from the formulas (docs/specification.md 3.13), on each backend."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from ds4.backend import Backend, open_backend
from ds4.cache import LayerCache
from ds4.config import Config
from ds4.quant import formats
from ds4.step import Chunk, plan
from ds4.weights.tensor import HostTensor
from tests.fixtures import flash_config

f32 = np.float32


@pytest.fixture
def be(backend: str) -> Backend:
    return open_backend(backend, cache="exact")


def weight(be: Backend, values: Any) -> Any:
    return be.load("golden", HostTensor("f32", np.ascontiguousarray(values, f32)))


def near(got: Any, want: Any, tolerance: float = 2e-6) -> None:
    np.testing.assert_allclose(got, want, atol=tolerance, rtol=tolerance)


def test_hyper_connections(be: Backend) -> None:
    i = np.arange(24)
    cfg: Any = SimpleNamespace(
        hc_mult=4, hc_eps=1e-6, hc_sinkhorn_iters=20, rms_norm_eps=0.0, hidden_size=4
    )
    streams = np.eye(4, dtype=f32)[None]  # f.f = 4 of 16, so r = 2: the mixes are sin(i + 1)
    w: Any = SimpleNamespace(
        fn=weight(be, np.repeat(np.sin(i + 1)[:, None] / 8, 16, 1)),
        base=weight(be, 0.5 * np.cos(2 * i)),
        scale=weight(be, [1, 0.5, 2]),
    )
    x, mix = be.hc_pre(w, weight(be, np.ones(4)), be.upload(streams), cfg)
    pre = np.array([0.792733, 0.668460, 0.453709, 0.431260])
    near(be.download(x)[0], pre / np.sqrt((pre**2).mean()), 5e-6)
    X = np.repeat(np.array([1, 10, 100, 1000], f32)[:, None], 4, 1)[None]
    after = be.hc_post(be.upload(np.full((1, 4), 5, f32)), be.upload(X), mix)
    near(be.download(after)[0, :, 0], [532.4808, 220.2838, 249.7813, 128.9075])


def test_router(be: Backend) -> None:
    z = np.array([[-3, -1, 0, 0.5, 1, 2, -20, 4]], f32)
    w: Any = SimpleNamespace(
        weight=weight(be, np.eye(8)),
        bias=weight(be, [2, 0, 0, 0, 0, -1, 1.5, -2]),
        tid2eid=None,
        held=None,
    )
    cfg: Any = SimpleNamespace(num_experts_per_tok=3, routed_scaling_factor=1.5)
    ids, weights = be.route(w, be.upload(z), plan([Chunk(0, 0, [0])], []).on(be), cfg)
    share = dict(zip(be.download(ids)[0].tolist(), be.download(weights)[0].tolist(), strict=True))
    assert set(share) == {0, 6, 4}
    near([share[0], share[6], share[4]], [0.241969, 0.000050, 1.257981])


def remembered(be: Backend, chunk: Chunk, kv: np.ndarray, freqs: Any, **parts: Any) -> LayerCache:
    """The cache after a step whose rows have the norm 1 by their own weight, and no compressor."""
    width = kv.shape[1]
    c = LayerCache(be.alloc("kv", 1, 16, width, 2), parts.get("rows"), parts.get("pool"))
    w: Any = SimpleNamespace(
        kv_norm=weight(be, np.ones(width)),
        freqs=freqs,
        ratio=parts.get("ratio", 0),
        compressor=parts.get("compressor"),
        indexer=None,
    )
    cfg: Any = SimpleNamespace(rms_norm_eps=0.0, head_dim=width, qk_rope_head_dim=2)
    step = plan([chunk], [w.ratio] if w.ratio else []).on(be)
    projected = [be.upload(x) for x in parts.get("projected", [])]
    be.remember(w, c, step, be.upload(kv), projected, cfg)
    return c


def test_compressed_pooling(be: Backend) -> None:
    t, c = np.arange(8)[:, None], np.arange(4)
    rows = np.concatenate([t + 0.1 * c, np.sin(t * (c + 1))], 1).astype(f32)
    pool = be.alloc("kv", 1, 4, 2)
    compressor = SimpleNamespace(
        ape=weight(be, 0.1 * (np.arange(4)[:, None] - c)), norm=weight(be, np.ones(2))
    )
    still = weight(be, [0.0])
    remembered(
        be,
        Chunk(0, 0, [0] * 8),
        np.ones((8, 2), f32),
        still,
        ratio=4,
        rows=be.alloc("float", 1, 16, 8),
        pool=pool,
        compressor=compressor,
        projected=[rows],
    )
    want = np.array([[1.964192, 1.990821], [3.407517, 3.499240]])
    want /= np.sqrt((want**2).mean(-1, keepdims=True))
    near(be.download(pool.data)[0, :2], want)


def turned(be: Backend, v: np.ndarray, pos: int, freqs: np.ndarray) -> np.ndarray:
    """A row as it is stored at a position, times the norm that it lost."""
    c = remembered(be, Chunk(0, pos, [0]), v[None], weight(be, freqs))
    row = be.download(c.window.data)[0, pos % 16]
    return np.asarray(row * np.sqrt((v.astype(np.float64) ** 2).mean()))


@pytest.mark.parametrize(
    ("pos", "at", "want"),
    [
        (1, slice(0, 4), [-0.013148, 0.008442, -0.005605, 0.056057]),
        (1, slice(62, 64), [0.968749, 0.984376]),
        (131072, slice(62, 64), [0.892841, 1.053710]),
    ],
)
def test_rope(be: Backend, pos: int, at: slice, want: list[float]) -> None:
    freqs = Config.from_dict(flash_config()).rope_freqs(4)
    near(turned(be, np.arange(64, dtype=f32) / 64, pos, freqs)[at], want)


@pytest.mark.parametrize("pos", [1, 127, 8191, 65537, 1_048_575])
def test_rope_is_accurate_at_any_position(be: Backend, pos: int) -> None:
    freqs = Config.from_dict(flash_config()).rope_freqs(0)
    angle = (f32(pos) * freqs).astype(np.float64)  # the angle is float32 by definition
    got = turned(be, np.tile([1, 0], 32).astype(f32), pos, freqs)
    near(got[::2], np.cos(angle), 1e-6)
    near(got[1::2], np.sin(angle), 1e-6)


def test_cache_rounding() -> None:
    q8 = formats.round_q8(np.linspace(-3, 5, 64, dtype=f32))
    for before, after in [(-2.873016, -2.75), (-0.460317, -0.46875), (2.079365, 2), (4.873016, 5)]:
        at = np.abs(np.linspace(-3, 5, 64) - before).argmin()
        assert q8[at] == f32(after)
    q4 = formats.round_q4(np.linspace(-3, 5, 32, dtype=f32))
    assert q4[-12:].tolist() == [2, 2, 3, 3, 3, 3, 4, 4, 4, 4, 4, 4]
