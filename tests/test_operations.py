"""Each backend's operations against the reference: native rows, ties, sampling, penalties."""

import numpy as np
import pytest

from ds4.backend import Backend, open_backend
from ds4.check import check_backend
from ds4.proxy import Meter, Mismatch, Pair
from ds4.quant import formats
from ds4.runner import Runner
from ds4.sampler import Sampler, SamplingParams
from ds4.step import Chunk, plan
from ds4.weights import load_weights
from ds4.weights.synthetic import SyntheticCheckpoint
from ds4.weights.tensor import HostTensor
from tests.fixtures import hard_weights

f32 = np.float32


def hard_rows(width: int, rng: np.random.Generator) -> np.ndarray:
    """Rows of many sizes, with zeros, ties between codes, tiny and large values."""
    rows = rng.standard_normal((64, width)) * np.exp(3 * rng.standard_normal((64, 1)))
    rows[0] = 0
    rows[1] = 1e-20
    rows[2] = np.resize(formats.E4M3[:127], width)
    rows[3] = np.resize((formats.E4M3[:126] + formats.E4M3[1:127]) / 2, width)
    rows[4] = np.resize([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5, -0.25, -5, 6, -6], width)
    rows[5] = 448 * 2.0 ** rng.integers(-9, 9)
    rows[6] = 1e6
    return rows.astype(f32)


def stored(be: Backend, kind: str, rows: np.ndarray, rotary: int) -> np.ndarray:
    ring = be.alloc(kind, 1, len(rows), rows.shape[1], rotary)  # type: ignore[arg-type]
    be.write(ring, be.upload(rows), plan([Chunk(0, 0, [0] * len(rows))], []).on(be))
    return be.download(ring.data)[0, : len(rows)]


def test_native_rows_are_rounded_to_the_bit(backend: str) -> None:
    rows = hard_rows(192, np.random.default_rng(0))
    be = open_backend(backend, cache="native")
    np.testing.assert_array_equal(stored(be, "kv", rows, 64), formats.round_kv(rows, 64))
    np.testing.assert_array_equal(stored(be, "float", rows, 0), rows)
    exact = open_backend(backend, cache="exact")
    np.testing.assert_array_equal(stored(exact, "kv", rows, 64), rows)


def test_native_index_rows_are_rounded_to_the_bit(backend: str) -> None:
    """Rows that Hadamard maps to known values exactly: the transform of hard FP4 rows."""
    be = open_backend(backend, cache="native")
    target = hard_rows(64, np.random.default_rng(1))
    target = (np.round(target * 64) / 64).clip(-8, 8)  # few bits, so that sums of 64 are exact
    rows = (target @ formats.hadamard(64)).astype(f32)
    np.testing.assert_array_equal(stored(be, "index", rows, 0), formats.round_q4(target))


def test_every_operation_agrees_with_the_reference(backend: str) -> None:
    results = check_backend(open_backend(backend))
    assert [r for r in results if not r.ok] == []
    assert {r.name for r in results} >= {"linears", "index", "attention", "sample", "adjust"}


def test_a_fused_backend_is_checked_by_its_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    be = open_backend("torch", "cpu")
    monkeypatch.setattr(type(be), "fused", True, raising=False)
    right = check_backend(be)
    assert [(r.name, r.ok) for r in right[:3]] == [
        (n, True) for n in ("prefill", "chunks", "decode")
    ]
    assert len(right) == 6
    plain = type(be).experts
    monkeypatch.setattr(type(be), "experts", lambda self, *args: plain(self, *args) * 1.2)
    assert [r.ok for r in check_backend(be)] == [False, False]


def test_the_check_notices_a_wrong_operation() -> None:
    class Wrong(type(open_backend("reference"))):  # type: ignore[misc]
        def experts(self, *args: object) -> np.ndarray:
            return super().experts(*args) * f32(1.001)

    from ds4.check import _exercise

    with pytest.raises(Mismatch, match="experts"):
        _exercise(Pair(open_backend("reference", cache="exact"), Wrong(cache="exact"), 1e-4))


def test_index_ties_go_to_the_earlier_entry(backend: str) -> None:
    be = open_backend(backend, cache="exact")
    pool = be.alloc("index", 2, 64, 16)
    keys = np.zeros((2, 65, 16), f32)
    keys[:, [9, 17, 30, 40], 0] = 1
    pool.data[:] = be.upload(keys)
    still = be.load("freqs", HostTensor("f32", np.zeros(2, f32)))
    step = plan([Chunk(0, 170, [0]), Chunk(1, 131, [0, 0])], []).on(be)
    q = np.zeros((3, 2, 16), f32)
    q[:, :, 0] = 1
    ids = be.index(be.upload(q), be.upload(np.ones((3, 2), f32)), pool, step, still, 4, 6)
    fewer = [9, 17, 30, 0, 1, 2]  # 33 entries are visible
    assert be.download(ids).tolist() == [[9, 17, 30, 40, 0, 1], fewer, fewer]


def test_index_names_only_visible_entries(backend: str) -> None:
    be = open_backend(backend, cache="exact")
    pool = be.alloc("index", 1, 64, 16)
    still = be.load("freqs", HostTensor("f32", np.zeros(2, f32)))
    step = plan([Chunk(0, 2, [0, 0, 0, 0])], [], pad_to=5).on(be)
    q = be.upload(np.ones((5, 2, 16), f32))
    ids = be.index(q, be.upload(np.ones((5, 2), f32)), pool, step, still, 4, 3)
    want = [[-1, -1, -1], [0, -1, -1], [0, -1, -1], [0, -1, -1], [-1, -1, -1]]
    assert be.download(ids).tolist() == want


def sample(be: Backend, logits: np.ndarray, numbers: np.ndarray, top_k: np.ndarray) -> list[int]:
    temperature, top_p, min_p, u = (be.upload(np.ascontiguousarray(x)) for x in numbers.T)
    k = be.upload(top_k)
    picked = be.sample(be.upload(logits), temperature, k, top_p, min_p, u)
    return be.download(picked).tolist()  # type: ignore[no-any-return]


def test_sampling_is_the_same_everywhere(backend: str) -> None:
    rng = np.random.default_rng(0)
    rows = 400
    logits = (3 * rng.standard_normal((rows, 97))).astype(f32)
    numbers = np.stack(
        [
            rng.choice([0, 0.3, 1, 2.5], rows),
            rng.choice([0.01, 0.5, 0.9, 1], rows),
            rng.choice([0, 0.02, 0.5, 1], rows),
            np.where(rng.random(rows) < 0.1, rng.choice([0, 1 - 2**-24], rows), rng.random(rows)),
        ],
        -1,
    ).astype(f32)
    top_k = rng.choice([0, 1, 2, 50, 97, 1000], rows).astype(np.int32)
    want = sample(open_backend("reference"), logits, numbers, top_k)
    got = sample(open_backend(backend), logits, numbers, top_k)
    assert np.mean(np.array(got) != want) <= 0.005  # the last bit of a running sum may differ


def test_sampling_follows_the_distribution(backend: str) -> None:
    be = open_backend(backend)
    p = np.array([0.5, 0.2, 0.15, 0.1, 0.05])
    u = ((np.arange(4000) + 0.5) / 4000).astype(f32)

    def shares(temperature: float, top_k: int, top_p: float, min_p: float) -> np.ndarray:
        numbers = np.array([[temperature, top_p, min_p, 0]] * len(u), f32)
        numbers[:, 3] = u
        logits = np.tile(np.log(p).astype(f32), (len(u), 1))
        picked = sample(be, logits, numbers, np.full(len(u), top_k, np.int32))
        return np.bincount(picked, minlength=5) / len(u)

    def cut(kept: int) -> np.ndarray:
        return np.where(np.arange(5) < kept, p, 0) / p[:kept].sum()

    np.testing.assert_allclose(shares(1, 0, 1, 0), p, atol=1e-3)
    np.testing.assert_allclose(shares(1, 3, 1, 0), cut(3), atol=1e-3)
    np.testing.assert_allclose(shares(1, 0, 0.71, 0), cut(3), atol=1e-3)
    np.testing.assert_allclose(shares(1, 0, 1, 0.15), cut(4), atol=1e-3)
    np.testing.assert_allclose(shares(0.5, 0, 1, 0), p**2 / (p**2).sum(), atol=1e-3)
    assert shares(0, 0, 1, 0)[0] == 1


def test_greedy_takes_the_lower_of_equal_logits(backend: str) -> None:
    logits = np.array([[1, 5, 5, 2]], f32)
    numbers = np.array([[0, 1, 0, 0.9]], f32)
    assert sample(open_backend(backend), logits, numbers, np.zeros(1, np.int32)) == [1]


@pytest.mark.parametrize(
    "cold",
    [
        {"temperature": 1e-38},  # logits divided by it are infinite in float32
        {"temperature": 1e-40, "top_k": 2**31 - 1},
        {"top_p": 1e-46},  # 0 in float32, which leaves no token
    ],
)
def test_the_least_that_may_be_asked_for_takes_the_likeliest(
    backend: str, cold: dict[str, float]
) -> None:
    be = open_backend(backend, "cpu")
    sampler = Sampler(SamplingParams(seed=1, **cold), [], 4)  # type: ignore[arg-type]
    assert sampler(be, be.upload(np.array([[1, 7, -90, 2]], f32)), 5) == 1


def test_adjust_penalises_and_biases(backend: str) -> None:
    be = open_backend(backend)
    logits = np.array([[2, -2, 0.5, 1], [4, 3, 2, 1]], f32)
    ids = np.array([[1, 0, -1], [-1, 3, 2]], np.int32)
    factor = np.array([[2, 2, 9], [9, 1, 0.5]], f32)
    offset = np.array([[0, 1, 9], [9, -7, 0]], f32)
    arrays = [be.upload(x) for x in (logits, ids, factor, offset)]
    want = [[2, -4, 0.5, 1], [4, 3, 4, -6]]
    assert be.download(be.adjust(*arrays)).tolist() == want
    assert be.download(arrays[0]).tolist() == logits.tolist()


def test_meter_counts_and_times(tmp_path: object) -> None:
    from ds4.check import small_config

    cfg = small_config()
    meter = Meter(open_backend("reference"), wait=True)
    weights = load_weights(meter, cfg, SyntheticCheckpoint(cfg))
    runner = Runner(meter, cfg, weights, context=64)  # type: ignore[arg-type]
    runner.run({0: [1, 2, 3]})
    assert meter.calls["attention"] == cfg.num_hidden_layers
    assert meter.calls["hc_pre"] == 2 * cfg.num_hidden_layers
    assert meter.calls["index"] == 2
    assert meter.seconds.keys() == meter.calls.keys()
    assert all(seconds > 0 for seconds in meter.seconds.values())


def test_packed_weights_multiply_exactly(backend: str) -> None:
    be = open_backend(backend)
    for tensor in hard_weights():
        w, values = be.load("w", tensor), tensor.decode()
        eye = np.eye(256, dtype=f32)  # one value at a time: nothing is rounded
        np.testing.assert_array_equal(be.download(be.linear(w, be.upload(eye))).T, values)


def test_mask_leaves_only_tokens_whose_bit_is_set(backend: str) -> None:
    be, rng = open_backend(backend, "cpu"), np.random.default_rng(3)
    logits = rng.standard_normal((3, 70)).astype(np.float32)
    allowed = rng.integers(-(2**31), 2**31, (3, 3)).astype(np.int32)
    allowed[1] = -1
    got = be.download(be.mask(be.upload(logits), be.upload(allowed)))
    for r, t in np.ndindex(logits.shape):
        bit = int(allowed[r, t // 32]) >> t % 32 & 1
        assert got[r, t] == (logits[r, t] if bit else -np.inf)


def test_gather_numbers_rows_on_from_array_to_array(backend: str) -> None:
    be = open_backend(backend, "cpu")
    parts = [be.upload(np.array(part, np.int32)) for part in ([3, 5], [7], [11, 13])]
    rows = be.upload(np.array([4, 0, 2, 1, 0], np.int32))
    assert be.download(be.gather(parts, rows)).tolist() == [13, 3, 7, 5, 3]
    assert be.upload(parts[0]) is parts[0]  # what is on the device stays there
