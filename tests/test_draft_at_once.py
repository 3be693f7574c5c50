"""Drafts made at once are those made place by place; what steps share is uploaded once."""

import gc
import itertools
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from ds4.backends.cuda import drafting, graph
from ds4.backends.cuda.ops import Cuda
from ds4.backends.reference.ops import Reference

from ds4 import sampler
from ds4.backend import CacheMode
from ds4.draft.drafter import Ask, Draft
from ds4.runner import Runner
from ds4.sampler import Row, Sampler, SamplingParams, pick
from tests.test_draft import GREEDY, Made, made, runner_of  # noqa: F401  (a fixture)

VOCAB = 96
TURNS = (
    ((0, 1),),
    ((0, 2),),
    ((1, 3),),
    ((1, 2), (0, 5)),
    ((0, 5),),
    ((0, 1), (1, 1)),
    ((1, 3), (0, 2)),
)  # slots and counts


def who(unmoved: bool = False, **options: Any) -> Sampler:
    """Or one whose guesses are made place by place: it has a bias, which changes nothing."""
    bias = {3: 0.0} if unmoved else {}
    return Sampler(SamplingParams(**options, logit_bias=bias), [], VOCAB)


KINDS: list[dict[str, Any]] = [
    {"temperature": 0.0},
    {"temperature": 0.8, "seed": 5, "top_k": 20, "top_p": 0.9, "min_p": 0.01},
    {"temperature": 1.0, "seed": 6},
]


class Texts:
    """Two texts that grow, in the caches of some runners."""

    def __init__(self, *runners: Runner) -> None:
        self.runners, self.rng = runners, np.random.default_rng(4)
        self.all = [self.rng.integers(0, VOCAB, 1).tolist() for _ in range(2)]

    def grow(self, slot: int, count: int) -> None:
        new = self.rng.integers(0, VOCAB, count).tolist()
        for runner in self.runners:
            runner.run({slot: [self.all[slot][-1], *new[:-1]]})
        self.all[slot] += new

    def asks(self, turn: Any, kinds: Any = (0, 0), unmoved: bool = False) -> list[Ask]:
        """Those of the last kind are by rejection."""
        return [
            Ask(slot, self.all[slot], count, who(unmoved, **KINDS[kind]), kind == 2)
            for (slot, count), kind in zip(turn, kinds, strict=False)
        ]


def same(got: Draft, want: Draft) -> None:
    assert got.guesses == want.guesses
    np.testing.assert_allclose(got.sure, want.sure, atol=1e-4)
    np.testing.assert_allclose(rows(got.chances), rows(want.chances), atol=1e-5)


def rows(parts: Sequence[Any]) -> list[list[float]]:
    return [row for part in parts for row in part.tolist()]


def test_guesses_at_once_are_those_made_place_by_place(
    made: Made,  # noqa: F811
    backend: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(drafting, "AT_ONCE", 4)  # so that chances come in parts
    runner, drafter = runner_of(made, backend, "exact")
    texts = Texts(runner)
    lengths, kinds = (
        (7, 40, 1, 2, 9, 1, 30, 3, 1, 5, 2, 4, 6, 1),
        ((0, 0), (1, 0), (0, 1), (2, 2), (2, 0)),
    )
    for number, (turn, length) in enumerate(zip(TURNS * 2, lengths, strict=True)):
        texts.grow(number % 2, length)
        texts.grow(1 - number % 2, 1)
        for kind in kinds:
            asks, others = texts.asks(turn, kind), texts.asks(turn, kind, unmoved=True)
            assert (drafter.is_whole(asks), drafter.is_whole(others)) == (True, False)
            draft = drafter.propose(asks)
            counts = [min(ask.count, drafter.longest) for ask in asks]
            assert [len(guess) for guess in draft.guesses] == counts
            same(draft, drafter.propose(others))


def test_what_is_penalized_or_told_to_others_is_not_made_at_once(made: Made) -> None:  # noqa: F811
    _, drafter = runner_of(made, "reference", "exact")
    ask, counted = Ask(0, [1], 1, GREEDY), who(temperature=0.0, presence_penalty=1.0)
    assert drafter.is_whole([ask, replace(ask, sampler=counted)])  # nothing to penalize yet
    counted.count(4)
    assert not drafter.is_whole([ask, replace(ask, sampler=counted)])
    drafter._led = object()
    assert not drafter.is_whole([ask])


class Replayed:
    """A CUDA graph without a GPU: what was recorded is called again, on the same tensors."""

    again: Callable[[], Any]
    results: tuple[torch.Tensor, ...]

    def replay(self) -> None:
        for old, new in zip(self.results, _tuple(self.again()), strict=True):
            old.copy_(new)


def _tuple(x: Any) -> tuple[torch.Tensor, ...]:
    return x if isinstance(x, tuple) else (x,)


@pytest.fixture
def recording(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets PyTorch's plain operations be recorded: a `capture` for them."""
    calls: list[Any] = []

    @contextmanager
    def recorded(graph: Replayed, **_: Any) -> Iterator[None]:
        yield
        graph.again, result = calls[-1]
        graph.results = _tuple(result)

    def capture(be: Any, fn: Any) -> Any:
        def noted(step: Any) -> Any:
            again = lambda: fn(step)  # noqa: E731
            calls.append((again, again()))
            return calls[-1][1]

        return graph.Graphs(noted, be)

    zeros = torch.zeros
    monkeypatch.setattr(torch, "zeros", lambda *a, pin_memory=False, **k: zeros(*a, **k))
    monkeypatch.setattr(graph.Graphs, "_compile", lambda *_: None)
    nothing = {"record": lambda _: None, "synchronize": lambda _: None}
    for name, fake in {
        "CUDAGraph": Replayed,
        "graph": recorded,
        "graph_pool_handle": lambda: None,
        "synchronize": lambda: None,
        "Event": type("Event", (), nothing),
    }.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    monkeypatch.setattr(Cuda, "capture", capture)


@pytest.mark.parametrize("cache", ["exact", "native"])
def test_a_recorded_draft_is_made_again_for_other_texts(
    made: Made,  # noqa: F811
    cache: CacheMode,
    request: pytest.FixtureRequest,
) -> None:
    """Of each count of guesses there is a recording of its own."""
    plain, stepwise = runner_of(made, "torch", cache)
    request.getfixturevalue("recording")
    runner, drafter = runner_of(made, "torch", cache)
    texts = Texts(plain, runner)
    for times, turn, kinds in itertools.product(range(4), TURNS, ((0, 0), (1, 0), (2, 2))):
        texts.grow(times % 2, 1 + times * (kinds == (0, 0)))
        texts.grow(1 - times % 2, 1)
        draft = drafter.propose(texts.asks(turn, kinds))
        same(draft, stepwise.propose(texts.asks(turn, kinds, unmoved=True)))
    # 1, 2 or 3 guesses of MTP and 5 of DSpark for a text, 1 or all for two; greedy, or drawn with
    # top_k or without. In exact mode 1 has company, as 1 of two texts, or as 2 greedy ones
    shapes = {
        ("mtp", "exact"): 3 * 4,
        ("mtp", "native"): 3 * 5,
        ("dspark", "exact"): 5 + 2 * 6,
        ("dspark", "native"): 3 * 6,
    }
    assert drafter._whole.recorded == shapes[drafter.name, cache]


class Counting(Reference):
    """Notes what is uploaded."""

    def __init__(self) -> None:
        super().__init__()
        self.uploaded: list[Any] = []

    def upload(self, host: Any) -> Any:
        self.uploaded.append(host)
        return super().upload(host)


def test_parameters_of_like_rows_are_uploaded_once() -> None:
    be, rng = Counting(), np.random.default_rng(0)
    hot, mild = (
        Sampler(SamplingParams(temperature=heat, top_k=7, top_p=0.9, min_p=0.01, seed=heat), [], 50)
        for heat in (2, 1)
    )
    biased = Sampler(SamplingParams(temperature=0.0, logit_bias={3: 2.0}), [], 50)
    cold = Sampler(SamplingParams(temperature=0.0, top_k=3), [], 50)  # as GREEDY: nothing to cut

    def picked(*who: Sampler | None) -> tuple[int, list[int]]:
        """Uploads, and the tokens at a position; without what is kept they are the same."""
        logits = rng.standard_normal((len(who), 50), np.float32)
        rows: list[Row | None] = [one and (one, 9) for one in who]
        before = len(be.uploaded)
        tokens = pick(be, logits, rows).tolist()
        assert pick(Reference(), logits, rows).tolist() == tokens
        return len(be.uploaded) - before, tokens

    for rows, first, later in (
        ((GREEDY,), 5, 0),
        ((cold,), 0, 0),
        ((None, GREEDY), 5, 0),
        ((cold, cold), 0, 0),
        ((hot, None, mild), 5, 1),  # the draws
        ((mild, None, hot), 5, 1),
        ((biased,), 3, 3),
    ):
        assert [picked(*rows)[0] for _ in range(3)] == [first, later, later]
    assert [picked(hot, None, mild)[0] for _ in range(2)] == [1, 1]
    for array in be.uploaded[:5]:
        with pytest.raises(ValueError, match="read-only"):
            array[:] = 1


def test_what_is_kept_of_a_backend_is_bounded_and_ends_with_it() -> None:
    be = Counting()
    for heat in range(1, 3 * sampler._KEPT):
        pick(
            be,
            np.zeros((1, 9), np.float32),
            [(Sampler(SamplingParams(temperature=heat), [], 9), 0)],
        )
    assert sampler._uploaded(be).rules.cache_info().currsize == sampler._KEPT
    gone, kept = weakref.ref(be), len(sampler._of_backends)
    del be
    gc.collect()
    assert gone() is None
    assert len(sampler._of_backends) < kept
