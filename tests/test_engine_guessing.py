"""The engine with guesses says what it says without them, and the same to grammars."""

import dataclasses
import itertools
from collections.abc import Sequence
from functools import partial
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from prometheus_client import CollectorRegistry

import ds4
from ds4 import SamplingParams
from ds4.draft.policy import Record
from ds4.engine import Engine
from ds4.engine.api import Grammar, Request
from ds4.engine.grammar import Grammars, along, masks
from ds4.engine.guessing import Guessing
from ds4.engine.prefix import PrefixCache
from ds4.server.metrics import EngineFigures
from ds4.server.wire import Pong, frame, from_engine
from tests.test_engine import CONTEXT, KINDS, ask, drain, run
from tests.test_speculate import Always


class Now(Always):
    """Guesses now and then: rounds and plain steps take turns."""

    calls = 0

    def lengths(self, records: Sequence[Record], most: Sequence[int]) -> list[int]:
        self.calls += 1
        return [min(self.count if self.calls % 5 < 2 else 0, each) for each in most]


SCHEMA = (
    '{"type": "object", "properties": {"name": {"type": "string"}, "age": {"type": "integer"}}}'
)


def requests(llm: ds4.LLM) -> list[Request]:
    texts = ["Once upon a time", "It was", "The old man said, " * 6, "My dear", "In the", "A" * 30]
    asked = [ask(llm, str(i), t, **k) for i, (t, k) in enumerate(zip(texts, KINDS, strict=True))]
    schema = Grammar("json_schema", SCHEMA)
    params = SamplingParams(max_tokens=24, seed=1, logprobs=1)
    return [*asked, Request("json", llm.encode("Sea:"), params, grammar=schema)]


@pytest.mark.parametrize(
    ("backend", "ahead", "policy"),
    [("reference", False, Always), ("torch", True, Now)],
)
def test_requests_get_the_same_with_guesses(
    backend: str, ahead: bool, policy: type[Always], monkeypatch: pytest.MonkeyPatch
) -> None:
    options: dict[str, Any] = {"cache": "exact", "context": CONTEXT, "slots": 3}
    plain = ds4.load("demo", backend, "cpu", **options)
    asked = requests(plain)
    want = run(Engine(plain, chunk=32), asked)
    llm = ds4.load("demo", backend, "cpu", **options, speculate="mtp")
    assert llm.speculator is not None
    llm.speculator.policy = policy(3)
    monkeypatch.setattr(llm.runner.be, "looks_ahead", ahead, raising=False)
    sizes = (1, 4, 8) if ahead else ()  # as on a GPU, which records steps
    monkeypatch.setattr(llm.runner.be, "decode_sizes", sizes, raising=False)
    engine = Engine(llm, chunk=32, prefixes=PrefixCache(llm.runner, 1 << 26))
    got = run(engine, asked)
    assert got.tokens == want.tokens
    assert got.text == want.text
    for name, end in want.ends.items():
        assert got.ends[name].reason == end.reason
        assert got.ends[name].completion_tokens == end.completion_tokens
    stats = engine.stats()
    assert 0 < stats.accepted_tokens < stats.drafted_tokens
    assert stats.generated_tokens == sum(map(len, want.tokens.values()))
    again = [dataclasses.replace(r, id=r.id + "again") for r in asked]  # from slots and snapshots
    assert run(engine, again).text == {f"{name}again": text for name, text in want.text.items()}
    for request in asked[:2]:
        engine.submit(request)
    engine.step()
    engine.cancel("0")
    assert drain(engine).ends["0"].reason == "cancelled"


def test_where_guessing_does_not_pay_the_engine_steps_plainly(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ends = itertools.accumulate(itertools.cycle([0.009, 0.01, 0.011]))  # of steps, in seconds
    clock = SimpleNamespace(perf_counter=partial(next, ends))
    monkeypatch.setattr("ds4.engine.guessing.time", clock)
    llm = ds4.load("demo", "torch", "cpu", context=CONTEXT, slots=2, speculate="lookup")
    assert llm.speculator is not None
    engine = Engine(llm)
    policy = llm.speculator.policy
    policy.common.right = [0.0] * 8
    run(engine, [ask(llm, "a", "The king", max_tokens=40)])
    assert engine.stats().drafted_tokens == 0
    assert policy.lengths([Record([0.9] * 8)], [8]) != [0]  # what a plain step takes is known


@pytest.mark.parametrize("speculate", ["lookup", "mtp"])
def test_rounds_are_warmed_and_nothing_is_learned(
    speculate: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    options: dict[str, Any] = {"cache": "exact", "context": CONTEXT, "slots": 2}
    plain = ds4.load("demo", "torch", "cpu", **options)
    asked = [ask(plain, str(n), "The king", max_tokens=20, temperature=n, seed=n) for n in (0, 1)]
    want = run(Engine(plain), asked)
    llm = ds4.load("demo", "torch", "cpu", **options, speculate=speculate)
    assert llm.speculator is not None
    rows, forward = list[int](), llm.runner.run

    def seen(tokens: dict[int, list[int]], *given: Any, **how: Any) -> Any:
        rows.append(len(tokens.get(0, [])) * bool(how.get("every_row")))
        return forward(tokens, *given, **how)

    monkeypatch.setattr(llm.runner, "run", seen)
    engine = Engine(llm, chunk=32)
    engine.warm()
    longest = llm.speculator.drafter.longest
    assert [rows.count(n + 1) for n in range(1, longest + 1)] == [2] * longest
    assert (engine.stats().drafted_tokens, llm.speculator.policy.costs.known(1)) == (0, False)
    assert run(engine, asked).text == want.text


def test_guesses_go_as_far_as_a_grammar_allows() -> None:
    llm = ds4.load("demo", "reference", context=64)
    assert llm.tokenizer is not None
    vocab = llm.config.vocab_size
    grammars = Grammars(llm.tokenizer, vocab, llm.config.eos_token_id)
    matcher = grammars.compile(Grammar("regex", "[abc]{1,6}")).result()
    a, b, x = (llm.tokenizer.encode(letter)[0] for letter in "abx")
    for given, allowed in (([a, b, a, x, a], 3), ([a, b], 2), ([x], 0), ([a] * 9, 6)):
        guess, bits = along(matcher, given, vocab)
        assert guess == given[:allowed]
        assert len(bits) == allowed + 1
        np.testing.assert_array_equal(bits[0], masks([(0, matcher)], (1, vocab))[0])
    assert matcher.consume_token(a)  # it stands where it stood
    want = masks([(0, matcher)], (1, vocab))[0]
    np.testing.assert_array_equal(along(matcher, [x], vocab)[1], want[None])
    grammars.close()


def test_figures_tell_what_guesses_brought() -> None:
    llm = ds4.load("demo", "mlx", "cpu", cache="exact", context=CONTEXT, slots=2, speculate="mtp")
    assert llm.speculator is not None
    policy = Now(2)
    llm.speculator.policy = policy
    engine = Engine(llm)
    run(engine, [ask(llm, "a", "The king", max_tokens=30, temperature=0.0)])
    stats = engine.stats()
    assert 0 < stats.drafts <= stats.drafted_tokens <= 2 * stats.drafts
    assert sum(stats.accepted_at) == stats.accepted_tokens > 0
    assert stats.saved_s == policy.saved_s != 0
    figures = frame(Pong(1, stats))
    message = from_engine(figures[4:])
    assert isinstance(message, Pong)
    assert tuple(message.stats.accepted_at) == tuple(stats.accepted_at)
    supervisor = SimpleNamespace(
        figures=lambda: stats, ready=True, about=None, restarts=0, refusals=0
    )
    pool: Any = SimpleNamespace(supervisors={"demo": supervisor}, swap_s=0.0)
    registry = CollectorRegistry()
    registry.register(EngineFigures(pool))
    said = registry.get_sample_value
    name = "ds4_spec_decode_num_accepted_tokens_per_pos_total"
    assert said(name, {"model_name": "demo", "position": "0"}) == stats.accepted_at[0]
    assert said("ds4_spec_decode_saved_seconds", {"model_name": "demo"}) == stats.saved_s


def test_a_step_of_a_request_that_ended_meanwhile_is_not_timed() -> None:
    timed: list[Any] = []
    speculator: Any = SimpleNamespace(stepped=lambda *given: timed.append(given))
    guessing = Guessing(speculator)
    ended: Any = SimpleNamespace(request=SimpleNamespace(id="1"), job=SimpleNamespace(slot=None))
    for _ in range(2):
        guessing.stepped([ended])
    assert not timed
