"""The MLX backend by itself: in-place caches, bounded memory, long contexts, joined matrices."""

from types import SimpleNamespace

import mlx.core as mx
import numpy as np
import pytest
from ds4.backends.mlx import Mlx, attention, index, memory, weights
from ds4.backends.mlx.facts import Facts, Run

import ds4
from ds4.backend import CacheMode, open_backend
from ds4.check import small_config
from ds4.runner import Runner
from ds4.step import Chunk, plan
from ds4.weights import load_weights
from ds4.weights.synthetic import SyntheticCheckpoint
from ds4.weights.tensor import HostTensor

MILLION = 1 << 20


@pytest.mark.parametrize("cache", ["native", "exact"])
def test_512_greedy_tokens_are_the_reference_s(cache: CacheMode) -> None:
    """Each is what the reference finds likeliest after the ones before it."""
    llm = ds4.load("demo", "mlx", cache=cache, context=640)
    runner, be = llm.runner, llm.runner.be
    ids = np.random.default_rng(1).integers(3, 4000, 24).tolist()
    logits = be.download(runner.run({0: ids}))
    for _ in range(512):
        ids.append(int(logits[-1].argmax()))
        logits = be.download(runner.run({0: ids[-1:]}))
    want = ds4.load("demo", "reference", cache=cache, context=640).logits(ids)
    picked = want[23:-1][np.arange(512), ids[24:]]
    assert (want[23:-1].max(-1) - picked).max() <= {"exact": 1e-4, "native": 2e-2}[cache]


def test_a_step_copies_no_cache() -> None:
    """A million positions need 300 MB of cache; what a step allocates does not depend on that."""
    cfg, be = small_config(), Mlx("cpu")
    w = load_weights(be, cfg, SyntheticCheckpoint(cfg))
    runner = Runner(be, cfg, w, MILLION, max_chunk=4096)  # so that no ring is small
    mx.eval(runner.run({0: [5] * 30}))
    rows = [one for layer in runner.cache for one in vars(layer).values() if one is not None]
    smallest = min(one.data.nbytes for one in rows)
    largest = max(one.data.nbytes for one in rows)
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    for token in range(9):  # blocks of 4 and of 8 end among them
        mx.eval(runner.run({0: [token]}))
    assert largest > 6e7
    assert mx.get_peak_memory() - before < smallest < 1e7


def pool_of_a_million(be: Mlx, width: int) -> object:
    pool = be.alloc("index", 1, MILLION // 4, width)
    pool.data = mx.random.normal(pool.data.shape, key=mx.random.key(0))
    mx.eval(pool.data)
    return pool


def test_a_million_tokens_are_indexed_in_bounded_memory() -> None:
    be, heads, width, k, tokens = Mlx("cpu", "exact"), 4, 8, 16, 48
    pool = pool_of_a_million(be, width)
    run = Run(0, tokens, 0, MILLION - tokens)
    q, gain = mx.random.normal((tokens, heads, width)), mx.random.normal((tokens, heads))
    mx.eval(q, gain)
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    ids = np.array(index.choose(q, gain, pool, run, 4, k))
    assert (
        mx.get_peak_memory() - before < 6 * 4 * index.PRODUCTS
    )  # 200 MB; dense takes 200 per head
    keys = np.array(pool.data)[0]
    for t in (0, 17, tokens - 1):
        visible = (run.start + t + 1) // 4
        scores = np.array(gain)[t] @ np.maximum(np.array(q)[t] @ keys[:visible].T, 0)
        order = np.argsort(-scores, kind="stable")[:k]
        np.testing.assert_allclose(scores[ids[t]], scores[order], rtol=1e-5)


def test_a_million_tokens_are_attended_in_bounded_memory() -> None:
    """Every entry of a layer that keeps one in 128, from a chunk at the end of the context."""
    be, heads, width, ratio, tokens = Mlx("cpu", "exact"), 8, 16, 128, 40
    ring, pool = be.alloc("kv", 1, 64, width), be.alloc("kv", 1, MILLION // ratio, width)
    key = mx.random.key(1)
    ring.data, pool.data = (mx.random.normal(r.data.shape, key=key) for r in (ring, pool))
    run = Run(0, tokens, 0, MILLION - tokens)
    q, sink = mx.random.normal((tokens, heads, width), key=key), mx.zeros(heads)
    mx.eval(q, sink, ring.data, pool.data)
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    layout = run, ring, 20, pool, ratio, None
    o = attention.attend(q, sink, *layout)
    mx.eval(o)
    assert mx.get_peak_memory() - before < 6 * 4 * attention.LOGITS
    facts = SimpleNamespace(pos=np.arange(run.start, run.stop), slot=np.zeros(tokens, int))
    facts.keep = lambda key, make: make()
    cache = SimpleNamespace(window=ring, pool=pool)
    near, far = attention.row_numbers(facts, cache, 20, ratio, None)  # type: ignore[arg-type]
    t = tokens - 1
    rows = np.concatenate([np.array(ring.data)[0][near[t]], np.array(pool.data)[0][far[t]]])
    e = np.exp(np.array(q)[t] @ rows.T)
    want = e @ rows / (e.sum(-1, keepdims=True) + 1)
    np.testing.assert_allclose(np.array(o)[t], want, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(("logits", "gathered"), [(1, 1), (4000, 700), (1 << 24, 1 << 23)])
def test_blocks_of_any_size_give_the_same(
    logits: int, gathered: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention, "LOGITS", logits)
    monkeypatch.setattr(attention, "GATHERED", gathered)
    monkeypatch.setattr(index, "PRODUCTS", logits)
    monkeypatch.setattr(index, "TILE", 3 if logits < 5000 else 8192)
    cfg = small_config()
    tokens = np.random.default_rng(0).integers(0, cfg.vocab_size, 90).tolist()
    got = []
    for name in ("reference", "mlx"):
        be = open_backend(name, "cpu", "exact")
        runner = Runner(be, cfg, load_weights(be, cfg, SyntheticCheckpoint(cfg)), 128, 1, 60)
        got += [
            be.download(runner.run({0: part}, every_row=True))
            for part in (tokens[:55], tokens[55:])
        ]
    for want, have in zip(got[:2], got[2:], strict=True):
        assert np.abs(want - have).max() <= 1e-4 * np.abs(want).max()


def test_runs_are_what_continues_a_sequence() -> None:
    step = plan([Chunk(1, 5, [0, 0, 0]), Chunk(0, 8, [0]), Chunk(2, 0, [0, 0])], [], pad_to=8)
    runs = [(r.first, r.end, r.slot, r.start) for r in Facts(step.on(Mlx("cpu"))).runs]
    assert runs == [(0, 3, 1, 5), (3, 4, 0, 8), (4, 6, 2, 0)]


def matrices(packed: bool) -> list[weights.Matrix]:
    rng = np.random.default_rng(0)
    found = []
    for rows in (96, 32, 64):
        if packed:
            codes = rng.integers(0, 256, (rows, 32), np.uint8)
            tensor = HostTensor("mxfp4", codes, rng.integers(120, 130, (rows, 2), np.uint8))
        else:
            tensor = HostTensor("f32", rng.standard_normal((rows, 64)).astype(np.float32))
        found.append(weights.pack(tensor))
    return found  # type: ignore[return-value]


@pytest.mark.parametrize("packed", [False, True])
def test_joined_matrices_are_one_and_take_no_more_memory(packed: bool) -> None:
    mx.set_default_device(mx.cpu)
    parts = matrices(packed)
    x = mx.random.normal((5, 64), key=mx.random.key(0))
    want = [np.array(part.matmul(x)) for part in matrices(packed)]
    mx.synchronize()
    before = mx.get_active_memory()
    got = Mlx("cpu").linears(parts, x)
    mx.eval(got)
    for a, b in zip(want, got, strict=True):
        np.testing.assert_allclose(np.array(b), a, atol=1e-5)
    del got, b
    mx.synchronize()
    assert mx.get_active_memory() - before <= 4096  # what is kept once for all sizes
    assert weights.groups(parts) == [[0, 1, 2]]
    for part, a in zip(parts, want, strict=True):  # each still works alone, as a view
        np.testing.assert_allclose(np.array(part.matmul(x)), a, atol=1e-5)


@pytest.mark.parametrize("info", [{"max_recommended_working_set_size": 96 << 30}, {}])
def test_a_mac_wires_what_macos_recommends(
    info: dict[str, int], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    wired: list[int] = []
    monkeypatch.setattr(mx, "device_info", lambda: info)
    monkeypatch.setattr(mx, "set_wired_limit", wired.append)
    kept: list[int] = []
    monkeypatch.setattr(mx, "set_cache_limit", kept.append)
    memory.set_limits()
    assert kept == [1 << 30]
    assert wired == list(info.values())
    assert len(caplog.messages) == (0 if info else 1)


def ask(llm: ds4.LLM) -> list[tuple[str, list[int], str]]:
    """Answers to several requests in turn, of every way to end and every kind of penalty."""
    kinds: list[dict[str, object]] = [
        {"temperature": 0.0},
        {"temperature": 0.8, "seed": 3, "repetition_penalty": 1.2, "frequency_penalty": 0.5},
        {"temperature": 0.0, "stop": ["e"]},
        {"temperature": 1.0, "seed": 5, "logprobs": 2},
        {"temperature": 0.0, "logit_bias": {llm.config.eos_token_id: 9.0}},
    ]
    done = [llm.generate("Once upon a time", max_tokens=12, **kind) for kind in kinds]
    done.append(llm.generate([5, 6, 7], max_tokens=1, temperature=0.0))
    return [(one.text, one.tokens, one.finish_reason) for one in done]


def test_looking_ahead_changes_no_answer() -> None:
    llm = ds4.load("demo", "mlx", context=128)
    assert llm.runner.be.looks_ahead  # type: ignore[attr-defined]
    ahead = ask(llm)
    llm.runner.be.looks_ahead = False  # type: ignore[attr-defined]
    assert ask(llm) == ahead
    assert len({finish for _, _, finish in ahead}) == 2


def test_a_stream_left_half_way_leaves_a_clean_state() -> None:
    llm = ds4.load("demo", "mlx", context=128)
    stream = llm.stream("Once upon a time", max_tokens=20, temperature=0.0)
    for _ in range(4):
        next(stream)
    stream.close()
    assert llm.runner.lengths[0] == len(llm._held)
    fresh = ds4.load("demo", "mlx", context=128)
    options = {"max_tokens": 9, "temperature": 0.0}
    prompt = "Once upon a time there"
    assert llm.generate(prompt, **options).tokens == fresh.generate(prompt, **options).tokens


def test_the_next_step_begins_before_its_token_is_read() -> None:
    """Steps and downloads in their order, seen from outside."""
    llm = ds4.load("demo", "mlx", context=128)
    seen: list[str] = []
    run_ahead, download = llm.runner.run_ahead, llm.runner.be.download
    llm.runner.run_ahead = lambda *a: seen.append("step") or run_ahead(*a)  # type: ignore
    llm.runner.be.download = lambda x: seen.append("read") or download(x)  # type: ignore
    llm.generate([3, 4, 5], max_tokens=3, temperature=0.0)
    assert seen == ["read", "step", "read", "step", "read", "read"]
