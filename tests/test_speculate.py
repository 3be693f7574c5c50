"""Speculation changes no text: with any guesses, the tokens are those that come without."""

from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

import ds4
from ds4.draft.choose import speculator
from ds4.draft.drafter import Ask, Draft
from ds4.draft.lookup import Lookup
from ds4.draft.policy import Policy, Record
from ds4.draft.speculate import Speculator, Turn
from ds4.engine import snapshot
from ds4.errors import BackendError, CheckpointError
from ds4.llm import LLM
from ds4.loader import find_model
from ds4.quant.quantize import quantize_checkpoint
from ds4.runner import Runner
from ds4.sampler import Sampler, SamplingParams
from ds4.weights import Checkpoint
from ds4.weights.verify import verify
from tests.test_draft import feed, make

VOCAB = 96


@pytest.fixture(scope="module", params=["mtp", "dspark"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(tmp_path_factory.mktemp(request.param), request.param)[0]


PAIRS = [("mtp", "reference"), ("mtp", "mlx"), ("mtp", "torch"), ("dspark", "mlx")]
pairs = pytest.mark.parametrize(("folder", "backend"), PAIRS, indirect=["folder"])


@pytest.fixture(scope="module")
def one_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(tmp_path_factory.mktemp("one"), "mtp")[0]


@pytest.fixture(scope="module")
def plain(one_folder: Path) -> LLM:
    return ds4.load(one_folder, "reference", cache="exact", context=256, slots=2)


class Always(Policy):
    """Guesses so many, whatever comes of it."""

    def __init__(self, count: int) -> None:
        super().__init__(max(count, 1))
        self.count = count

    def lengths(self, records: Sequence[Record], most: Sequence[int]) -> list[int]:
        return [min(self.count, each) for each in most]


class Stub(Lookup):
    """Guesses what it is told to."""

    def __init__(self, guess: Callable[[Ask], list[int]]) -> None:
        super().__init__(7)
        self.guess = guess

    def propose(self, asks: Sequence[Ask]) -> Draft:
        return Draft([self.guess(ask)[: ask.count] for ask in asks])


def greedy(runner: Runner, prompt: list[int], count: int, slot: int = 0) -> list[int]:
    runner.rewind(slot, 0)
    feed(runner, slot, prompt[:-1], [24])
    out = prompt[-1:]
    for _ in range(count):
        out.append(int(runner.be.download(runner.run({slot: out[-1:]}))[0].argmax()))
    return out[1:]


def state(runner: Runner, slot: int, length: int) -> np.ndarray:
    """All that a continuation reads; in exact mode float32."""
    return snapshot.save_ending(runner, slot, 0, length).view(np.float32)


@pytest.mark.parametrize("kind", ["right", "wrong", "coin", "random"])
def test_any_guesses_give_the_same_tokens_and_the_same_state(plain: LLM, kind: str) -> None:
    runner, rng = plain.runner, np.random.default_rng(3)
    none = Sampler(SamplingParams(temperature=0.0), [], VOCAB)
    prompt, want = list[int](), list[int]()

    def guess(ask: Ask) -> list[int]:
        known = want[len(ask.text) - len(prompt) :][: ask.count]
        if kind == "random":
            return rng.integers(0, VOCAB, ask.count).tolist()
        if kind == "wrong":
            return [(token + 1) % VOCAB for token in known]
        return [t if kind == "right" or rng.random() < 0.5 else 0 for t in known]

    for count in (1, 3, 6):
        prompt[:] = rng.integers(0, VOCAB, int(rng.integers(2, 45))).tolist()
        want[:] = greedy(runner, prompt, 40, slot=1)
        speculator = Speculator(runner, Stub(guess), Always(count))
        runner.rewind(0, 0)
        feed(runner, 0, prompt[:-1], [24])
        text, rounds = list(prompt), 0
        while len(text) < len(prompt) + 24:
            (came,) = speculator.round([Turn(0, text, none, 99, speculator.policy.record())])
            text += came.tokens
            rounds += 1
            assert runner.lengths[0] == len(text) - 1
        assert text[len(prompt) :] == want[: len(text) - len(prompt)]
        if kind == "right":
            assert rounds == -(-24 // (count + 1))
        if kind == "wrong":
            assert rounds == 24
        runner.rewind(1, 0)
        feed(runner, 1, text[:-1], [24])
        got = state(runner, 0, len(text) - 1)
        np.testing.assert_allclose(got, state(runner, 1, len(text) - 1), atol=1e-3)


OPTIONS: list[dict[str, Any]] = [
    {"temperature": 0.0},
    {"temperature": 0.7, "seed": 5, "repetition_penalty": 1.3, "presence_penalty": 0.4},
    {"temperature": 1.0, "seed": 6, "top_p": 0.8, "logit_bias": {3: 2.0}},
]


@pairs
def test_text_is_the_same_on_every_backend(folder: Path, backend: str) -> None:
    without = ds4.load(folder, backend, "cpu", cache="exact", context=256)
    llm = ds4.load(folder, backend, "cpu", cache="exact", context=256, speculate="mtp")
    assert llm.speculator is not None
    llm.speculator.policy = Always(4)
    own = llm.speculator.drafter
    both = Stub(lambda ask: Lookup.propose(both, [ask]).guesses[0] or own.propose([ask]).guesses[0])
    both.cache, both.near, both.watch = own.cache, own.near, own.watch  # type: ignore[method-assign]
    llm.speculator.drafter = both
    rng = np.random.default_rng(1)
    prompt = rng.integers(2, VOCAB, 40).tolist()  # longer than a window
    for number, options in enumerate(OPTIONS):
        made, want = (one.generate(prompt, max_tokens=20, **options) for one in (llm, without))
        assert made.tokens == want.tokens
        assert made.usage == want.usage  # what was cached, too: a prompt goes on from the last
        prompt = prompt[: 36 - number] + want.tokens[:12] + [5, 6]
    assert llm.speculator.tally.drafted_tokens > 0


@pytest.mark.parametrize("sizes", [(), (1, 8)])
def test_logprobs_stops_and_limits_are_those_of_plain_text(
    plain: LLM, one_folder: Path, sizes: tuple[int, ...]
) -> None:
    llm = ds4.load(one_folder, "reference", cache="exact", context=80, speculate="lookup")
    llm.runner.be.decode_sizes = sizes  # type: ignore[attr-defined]  # of a backend that records
    options: dict[str, Any] = {"temperature": 0.0, "logit_bias": {1: -100.0}}  # never the end
    want = plain.generate([5, 6, 7], max_tokens=30, logprobs=2, **options)
    right = Stub(lambda ask: want.tokens[len(ask.text) - 3 :])
    llm.speculator = Speculator(llm.runner, right, Always(5))
    made = llm.generate([5, 6, 7], max_tokens=30, logprobs=2, **options)
    assert (made.tokens, made.finish_reason) == (want.tokens, want.finish_reason)
    for got, expected in zip(made.logprobs or (), want.logprobs or (), strict=True):
        assert got.token == expected.token
        assert got.logprob == pytest.approx(expected.logprob, abs=1e-4)
    for end in (1, 4, 7):
        stop = next(t for t in want.tokens[end:] if t not in want.tokens[:end])
        each = [one.generate([5, 6, 7], stop_ids=[stop], **options) for one in (llm, plain)]
        assert each[0].tokens == each[1].tokens == want.tokens[: len(each[0].tokens)]
        assert each[0].finish_reason == "stop"
    want = plain.generate([5, 6, 7], max_tokens=77, **options)
    full = llm.generate([5, 6, 7], **options)  # to the end of the context
    assert (full.tokens, llm.runner.lengths[0]) == (want.tokens, 79)


def test_with_experts_in_host_memory_steps_stay_short(one_folder: Path) -> None:
    """A longer one would bring all of them, as a prompt does."""
    llm = ds4.load(one_folder, "reference", context=80, speculate="lookup")
    be: Any = llm.runner.be
    be.decode_sizes, be.placement = (1, 8), object()
    speculator = Speculator(llm.runner, Stub(lambda ask: []), Always(5))
    none = Sampler(SamplingParams(temperature=0.0), [], VOCAB)
    for count, most in (1, 5), (2, 3), (3, 1), (8, 0), (9, 0):
        turns = [
            Turn(n, [5, 6], none, 10 - 9 * (n == 1), speculator.policy.record())
            for n in range(count)
        ]
        want = [most] * count
        want[1:2] = [0] * (count > 1)  # may make one token, so guesses none
        assert speculator.lengths(turns) == want


@pairs
def test_several_sequences_guess_in_one_step(folder: Path, backend: str) -> None:
    llm = ds4.load(folder, backend, "cpu", cache="exact", context=128, slots=3, speculate="mtp")
    runner, speculator = llm.runner, llm.speculator
    assert speculator is not None
    speculator.policy = Always(3)
    rng = np.random.default_rng(8)
    prompts = {slot: rng.integers(0, VOCAB, 5 + 9 * slot).tolist() for slot in (2, 0, 1)}
    none = Sampler(SamplingParams(temperature=0.0), [], VOCAB)
    want = {slot: greedy(runner, prompt, 16, slot) for slot, prompt in prompts.items()}
    for slot, prompt in prompts.items():
        runner.rewind(slot, 0)
        feed(runner, slot, prompt[:-1], [24])
    texts = {slot: list(prompt) for slot, prompt in prompts.items()}
    while min(len(texts[s]) - len(prompts[s]) for s in texts) < 12:
        turns = [
            Turn(slot, text, none, 1 + slot, speculator.policy.record())
            for slot, text in texts.items()
        ]
        for turn, came in zip(turns, speculator.round(turns), strict=True):
            assert came.guessed <= turn.slot  # as many as may still come
            texts[turn.slot] += came.tokens
    for slot, prompt in prompts.items():
        made = texts[slot][len(prompt) :]
        assert made[:16] == want[slot][: len(made)]


def test_a_restored_sequence_is_guessed_like_the_one_it_was_taken_from(
    folder: Path, backend: str
) -> None:
    llm = ds4.load(folder, backend, "cpu", context=128, slots=2, speculate="mtp")
    runner, none = llm.runner, Sampler(SamplingParams(temperature=0.0), [], VOCAB)
    assert llm.speculator is not None
    drafter = llm.speculator.drafter
    ids = np.random.default_rng(2).integers(0, VOCAB, 41).tolist()
    runner.rewind(0, 0)
    feed(runner, 0, ids[:-1], [17])
    ending = snapshot.save_ending(runner, 0, 0, 40)
    want = drafter.propose([Ask(0, ids, 5, none)]).guesses
    feed(runner, 1, ids[::-1], [24])
    snapshot.restore_ending(runner, 1, 0, 40, ending)
    assert drafter.propose([Ask(1, ids, 5, none)]).guesses == want


def test_what_cannot_guess_says_so(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(BackendError, match="off, lookup, mtp, auto"):
        ds4.load(folder, "reference", speculate="fast")  # type: ignore[arg-type]
    alone: Any = SimpleNamespace(be=SimpleNamespace(name="mlx", ranks=SimpleNamespace(size=2)))
    with pytest.raises(BackendError, match="each plan their own steps"):
        speculator(alone, Checkpoint(folder), "lookup")
    auto = ds4.load(folder, "reference", speculate="auto")
    assert auto.speculator is not None
    assert auto.speculator.drafter.name in ("mtp", "dspark")
    from tests.fixtures import plain_fixture

    plain_fixture(tmp_path)
    auto = ds4.load(tmp_path, "reference", speculate="auto")
    assert auto.speculator is not None
    assert auto.speculator.drafter.name == "lookup"
    with pytest.raises(CheckpointError, match="no drafter"):
        ds4.load(tmp_path, "reference", speculate="mtp")


class Fickle(Policy):
    """Guesses now and then."""

    def lengths(self, records: Sequence[Record], most: Sequence[int]) -> list[int]:
        return [min(2, each) * (self._plain > 2) for each in most]


def test_steps_begin_ahead_of_the_host_while_nobody_guesses(
    plain: LLM, one_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    llm = ds4.load(one_folder, "reference", cache="exact", context=256, speculate="mtp")
    assert llm.speculator is not None
    llm.speculator.policy = Fickle(3)
    ahead: list[int] = []
    run_ahead = llm.runner.run_ahead
    monkeypatch.setattr(llm.runner.be, "looks_ahead", True, raising=False)
    monkeypatch.setattr(llm.runner, "run_ahead", lambda *args: ahead.append(1) or run_ahead(*args))
    prompt = [3, 1, 4, 1, 5, 9, 2, 6]
    for options in OPTIONS:
        made, want = (one.generate(prompt, max_tokens=30, **options) for one in (llm, plain))
        assert made.tokens == want.tokens
        assert made.usage == want.usage
        prompt = prompt + want.tokens[:9]
    tally = llm.speculator.tally
    assert 5 < tally.drafts < 30
    assert len(ahead) > 20


def test_a_quantized_models_drafter_changes_no_text(tmp_path: Path) -> None:
    quantize_checkpoint(find_model("demo"), tmp_path, "q2", "rtn")
    report = verify(tmp_path, full=True)
    assert (report.ok, report.checksums) == (True, "manifest")
    options: dict[str, Any] = {"cache": "exact", "context": 96}
    without = ds4.load(tmp_path, "mlx", "cpu", **options)
    llm = ds4.load(tmp_path, "mlx", "cpu", **options, speculate="mtp")
    assert llm.speculator is not None
    llm.speculator.policy = Always(3)
    for how in ({"temperature": 0.0}, {"temperature": 0.8, "seed": 3}):
        made, want = (x.generate("The old king", max_tokens=40, **how) for x in (llm, without))
        assert made.tokens == want.tokens
    tally = llm.speculator.tally
    assert tally.accepted_tokens > tally.drafts / 4
