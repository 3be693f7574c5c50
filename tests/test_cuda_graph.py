"""The integers of a step in one array, as a recorded step reads them."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from ds4.backends.cuda import graph
from ds4.backends.cuda.ops import Cuda

from ds4 import model
from ds4.backend import CacheMode
from ds4.cache import make_cache
from ds4.draft.dspark import Dspark
from ds4.draft.mtp import Mtp
from ds4.loader import Synthetic
from ds4.runner import Runner
from ds4.step import Chunk, Step, plan, plan_decode, watched
from ds4.weights import load_weights
from ds4.weights.load import load_drafter
from ds4.weights.synthetic import SyntheticCheckpoint


def test_a_step_comes_back_from_one_array() -> None:
    first = plan([Chunk(0, 3, [7]), Chunk(2, 127, [9])], [4, 128], pad_to=4)
    later = plan([Chunk(1, 130, [5]), Chunk(0, 8, [6])], [4, 128], pad_to=4)
    assert graph._key(first) == graph._key(later)
    numbers = np.full(sum(graph._rooms(first)), -7, np.int32)
    seen = graph._spread(first, torch.from_numpy(numbers))  # views: they show what is written next
    for step in (first, later):
        graph._flatten(step, numbers)
        for name in ("tokens", "slot", "pos", "last"):
            np.testing.assert_array_equal(getattr(seen, name).numpy(), getattr(step, name))
        for ratio, blocks in step.emit.items():
            np.testing.assert_array_equal(seen.emit[ratio].numpy(), blocks)
    parts = [seen.tokens, seen.slot, seen.pos, seen.last, *seen.emit.values()]
    assert not any((x.data_ptr() - parts[0].data_ptr()) % 16 for x in parts)


def test_steps_of_other_shapes_are_recorded_apart() -> None:
    one, more = plan([Chunk(0, 3, [7])], [4], pad_to=1), plan([Chunk(0, 3, [7])], [4], pad_to=2)
    further = plan([Chunk(0, 300, [7])], [4], pad_to=1)
    assert len({graph._key(step) for step in (one, more, further)}) == 3


def test_tokens_on_the_device_take_their_place() -> None:
    plain = plan_decode(np.array([7, 9, 0, 0], np.int32), [1, 0], [3, 127], [4, 128], 4)
    tokens = torch.tensor([7, 9, 0, 0])
    ahead = plan_decode(tokens, [1, 0], [3, 127], [4, 128], 4)
    assert graph._key(ahead) == graph._key(plain)
    numbers = np.full(sum(graph._rooms(plain)), -7, np.int32)
    graph._flatten(ahead, numbers)
    graph._overwrite(torch.from_numpy(numbers), tokens)
    want = np.full_like(numbers, -7)
    graph._flatten(plain, want)
    np.testing.assert_array_equal(numbers, want)
    same = plan([Chunk(1, 3, [7]), Chunk(0, 127, [9])], [4, 128], pad_to=4)
    for ratio, blocks in same.emit.items():
        np.testing.assert_array_equal(plain.emit[ratio][:2], blocks)
    np.testing.assert_array_equal(plain.pos, same.pos)


@pytest.mark.parametrize("drafter", [None, "mtp", "dspark"])
@pytest.mark.parametrize("lengths", [(50,), (33, 40, 1)])
def test_padding_of_a_chunk_changes_nothing(lengths: tuple[int, ...], drafter: Any) -> None:
    """Logits, and every row of the caches but the scratch rows; also of a drafter that watches."""
    synthetic, be = Synthetic("tiny", "native"), Cuda("cpu")
    cfg = synthetic.config()
    weights = load_weights(be, cfg, synthetic.source())
    rng, ratios = np.random.default_rng(0), sorted({r for r in cfg.compress_ratios if r})
    if drafter:  # what it watches is no longer
        lengths = tuple(min(length, cfg.sliding_window) for length in lengths)
    starts = {slot: 3 * slot for slot in range(len(lengths))}
    chunks = [
        Chunk(slot, starts[slot], rng.integers(3, cfg.vocab_size, count).tolist())
        for slot, count in enumerate(lengths)
    ]
    step = plan(chunks, ratios)
    logits, caches = [], []
    for shaped in (lambda step: step, graph.padded):
        runner = Runner(be, cfg, weights, 256, len(lengths), 256)
        caches.append(runner.cache)
        if drafter:
            made = SyntheticCheckpoint(cfg, recipe=synthetic.source().recipe, drafter=drafter)
            own = load_drafter(be, cfg, made)
            runner.attach((Mtp if drafter == "mtp" else Dspark)(runner, own))
            caches[-1] = [*runner.cache, *runner.drafter.cache]
            step = watched(step, runner.drafter.near)
        assert graph.repeats(step)
        logits.append(runner._on_device(shaped(step).on(be))[: len(lengths)])
    torch.testing.assert_close(*logits, rtol=1e-5, atol=1e-5)
    for plain, other in zip(*caches, strict=True):
        for name, rows in vars(plain).items():
            if rows is not None:
                a, b = rows.data[:, :-1], getattr(other, name).data[:, :-1]
                torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("cache", ["exact", "native"])
def test_a_token_alone_has_a_row_of_padding_in_exact_mode(
    cache: CacheMode, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Then it takes the kernels that it takes in company; its logits are those without."""
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: None)
    synthetic, be = Synthetic("tiny", "native"), Cuda("cpu", cache)
    cfg = synthetic.config()
    weights = load_weights(be, cfg, synthetic.source())
    ratios = sorted({r for r in cfg.compress_ratios if r})
    caches, rows = [make_cache(be, cfg, 1, 256, 64) for _ in range(2)], []

    def fn(step: Step) -> torch.Tensor:
        rows.append(len(step.tokens))
        return model.forward(be, cfg, weights, caches[0], step)

    for at, tokens in enumerate((np.array([5], np.int32), torch.tensor([6]))):
        step = plan_decode(tokens, [0], [at], ratios, 1)
        graphs = graph.Graphs(fn, be)  # a new one records nothing
        want = model.forward(be, cfg, weights, caches[1], step.on(be))
        torch.testing.assert_close(graphs(step), want, rtol=1e-5, atol=1e-5)
    assert rows == ([2, 2] if cache == "exact" else [1, 1])


def test_chunks_of_like_lengths_are_recorded_as_one() -> None:
    def shape(start: int, count: int) -> Step:
        return graph.padded(plan([Chunk(0, start, [7] * count)], [4, 128]))

    keys = {graph._key(shape(start, count)) for start, count in ((0, 200), (37, 256), (128, 193))}
    assert len(keys) == 2  # spans of 256 and 512
    assert graph._key(shape(0, 200)) != graph._key(shape(0, 192))


def test_guesses_of_like_lengths_are_recorded_as_one() -> None:
    """Wherever sequences are, and whatever blocks they complete; but not as others' steps."""
    rng, widths = np.random.default_rng(0), (6, 6, 5, 6, 6, 6, 6, 6)

    def verified(widths: tuple[int, ...]) -> Step:
        starts = rng.integers(0, 240, len(widths)).tolist()
        chunks = [Chunk(slot, starts[slot], [7] * width) for slot, width in enumerate(widths)]
        return plan(chunks, [4, 128], sum(widths), every_row=True)

    steps = [verified(widths) for _ in range(20)]
    assert all(map(graph.verifies, steps))
    assert len({graph._key(step) for step in steps}) == 1
    watched = replace(steps[0], before=steps[0].pos - 1)
    assert graph.verifies(watched)
    assert not graph.verifies(replace(watched, near=watched))
    assert not graph.verifies(verified((9,) * 15))
    drafted = replace(watched, emit={}, last=watched.last[:16])
    assert graph.verifies(drafted)
    assert not graph.verifies(replace(drafted, emit=watched.emit))
    others = watched, verified((47,)), verified((6,) * 8), graph.padded(steps[0])
    assert len({graph._key(step) for step in (steps[0], *others)}) == 5


def test_what_has_no_end_of_shapes_is_not_recorded() -> None:
    chunk = plan([Chunk(0, 0, [7] * 100)], [4, 128])
    assert graph.repeats(chunk)
    assert not graph.verifies(chunk)
    assert not graph.repeats(plan([Chunk(0, 0, [7] * 100)], [4, 128], every_row=True))
    assert not graph.repeats(plan([Chunk(0, 0, [7] * 257)], [4, 128]))
    assert graph.repeats(watched(chunk, 128))
    assert not graph.repeats(watched(chunk, 99))


Fn = Callable[[Step], torch.Tensor]


@pytest.fixture
def recordable(monkeypatch: pytest.MonkeyPatch) -> Callable[[Fn], Fn]:
    """CUDA graphs without a GPU: a replay calls what was recorded, on the same tensors."""
    calls: list[Any] = []
    made: list[torch.Tensor] = []

    class Replayed:
        again: Callable[[], torch.Tensor]
        logits: torch.Tensor

        def replay(self) -> None:
            self.logits.copy_(self.again())

    @contextmanager
    def recording(graph: Replayed, **_: Any) -> Iterator[None]:
        yield
        graph.again, graph.logits = calls[-1], made[-1]

    zeros = torch.zeros
    monkeypatch.setattr(torch, "zeros", lambda *a, pin_memory=False, **k: zeros(*a, **k))
    monkeypatch.setattr(graph.Graphs, "_compile", lambda *_: None)
    for name, fake in {
        "CUDAGraph": Replayed,
        "graph": recording,
        "graph_pool_handle": lambda: None,
        "synchronize": lambda: None,
        "Event": type("Event", (), {"record": lambda _: None, "synchronize": lambda _: None}),
    }.items():
        monkeypatch.setattr(torch.cuda, name, fake)

    def followed(fn: Fn) -> Fn:
        def run(step: Step) -> torch.Tensor:
            calls.append(lambda: fn(step))
            made.append(fn(step))
            return made[-1]

        return run

    return followed


def test_recorded_steps_are_as_written_at_many_positions(recordable: Callable[[Fn], Fn]) -> None:
    """Chunks of prompts, tokens and guesses of two sequences, each shape recorded once."""
    synthetic, be = Synthetic("tiny", "native"), Cuda("cpu")
    be.compiles_ahead = True  # type: ignore[attr-defined]
    cfg = synthetic.config()
    weights = load_weights(be, cfg, synthetic.source())
    caches = [make_cache(be, cfg, 2, 512, 256) for _ in range(2)]
    plain = lambda step: model.forward(be, cfg, weights, caches[1], step.on(be))  # noqa: E731
    graphs = graph.Graphs(
        recordable(lambda step: model.forward(be, cfg, weights, caches[0], step)), be
    )
    rng, ratios = np.random.default_rng(0), sorted({r for r in cfg.compress_ratios if r})
    lengths, seen = [0, 0], set()

    def run(tokens: dict[int, int], pad_to: int = 0, every_row: bool = False) -> None:
        ids = {slot: rng.integers(3, cfg.vocab_size, n).tolist() for slot, n in tokens.items()}
        chunks = [Chunk(slot, lengths[slot], ids[slot]) for slot in ids]
        step = plan(chunks, ratios, pad_to, every_row)
        for slot, n in tokens.items():
            lengths[slot] += n
        seen.add(graph._key(step if pad_to else graph.padded(step)))
        torch.testing.assert_close(graphs(step), plain(step), rtol=1e-4, atol=1e-4)

    for first, second in ((40, 70), (61, 65), (33, 128), (64, 99)):
        lengths[:] = 0, 0
        run({0: first})
        run({0: second})
        run({1: 50})
        for _ in range(3):
            run({0: 1, 1: 1}, pad_to=2)
            run({0: 18, 1: 21}, pad_to=39, every_row=True)
    assert graphs.recorded == len(seen)


def test_the_recordings_used_last_are_kept(
    recordable: Callable[[Fn], Fn], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(graph, "SHAPES", 2)
    graphs = graph.Graphs(recordable(lambda step: 2 * step.tokens), Cuda("cpu"))

    def run(size: int) -> int:
        """How many recordings it takes."""
        before, tokens = graphs.recorded, np.arange(size, dtype=np.int32)
        step = plan_decode(tokens, range(size), range(size), [4], size)
        assert graphs(step).tolist() == (2 * tokens).tolist()
        return graphs.recorded - before

    assert [run(size) for size in (1, 1, 2, 2, 3, 3)] == [0, 1] * 3  # of 3 shapes, 1 is dropped
    assert [run(size) for size in (2, 3, 2, 1, 2, 1, 3)] == [0, 0, 0, 1, 0, 0, 1]
