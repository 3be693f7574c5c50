"""Many requests at once give what each gives alone, and every end frees its slot."""

import json
from collections.abc import Iterable

import pytest

import ds4
from bench.engine_equivalence import compare
from ds4 import LLM, SamplingParams
from ds4.engine import Engine
from ds4.engine.api import Finished, Grammar, Progress, QueueFull, Request, Tokens
from ds4.engine.prefix import PrefixCache
from ds4.engine.scheduler import Limits
from ds4.errors import PromptError

CONTEXT = 256


@pytest.fixture(scope="module", params=("reference", "mlx", "torch"))
def llm(request: pytest.FixtureRequest) -> LLM:
    return ds4.load("demo", request.param, "cpu", context=CONTEXT, slots=3)


@pytest.fixture(scope="module")
def fast() -> LLM:
    return ds4.load("demo", "torch", "cpu", context=CONTEXT, slots=2)


class Log:
    """What an engine told of each request."""

    def __init__(self) -> None:
        self.tokens: dict[str, list[int]] = {}
        self.text: dict[str, str] = {}
        self.ends: dict[str, Finished] = {}
        self.progress: list[Progress] = []

    def add(self, engine: Engine) -> None:
        for event in engine.step():
            assert event.id not in self.ends, "nothing comes after the last event"
            if isinstance(event, Progress):
                self.progress.append(event)
                continue
            self.text[event.id] = self.text.get(event.id, "") + event.text
            if isinstance(event, Tokens):
                self.tokens.setdefault(event.id, []).extend(event.tokens)
            else:
                self.ends[event.id] = event


def drain(engine: Engine, log: Log | None = None) -> Log:
    log = log or Log()
    while engine.has_work():
        log.add(engine)
    assert engine.stats().running == engine.stats().waiting == 0
    assert engine.step() == []
    return log


def run(engine: Engine, requests: Iterable[Request]) -> Log:
    for request in requests:
        engine.submit(request)
    return drain(engine)


def ask(llm: LLM, name: str, text: str, **options: object) -> Request:
    options = {"temperature": 0.0, "max_tokens": 8} | options
    return Request(name, llm.encode(text), SamplingParams(**options))  # type: ignore[arg-type]


KINDS: list[dict[str, object]] = [
    {},
    {"temperature": 0.8, "seed": 3, "repetition_penalty": 1.2, "frequency_penalty": 0.5},
    {"stop": ["e ", "nd"], "max_tokens": 16},
    {"temperature": 1.0, "seed": 5, "logprobs": 2, "top_k": 20},
    {"logit_bias": {1: 40.0}},
    {"temperature": 0.7, "seed": 7, "min_p": 0.1, "max_tokens": 12},
]


def test_each_request_gets_what_it_gets_alone(llm: LLM) -> None:
    texts = ["Once upon a time", "It was", "The old man said, " * 9, "My dear", "In the", "A" * 40]
    asked = [ask(llm, str(i), t, **k) for i, (t, k) in enumerate(zip(texts, KINDS, strict=True))]
    log = run(Engine(llm, chunk=32), asked)
    alone = Engine(ds4.load("demo", llm.backend_name, "cpu", context=CONTEXT), chunk=32)
    for request in asked:
        want = run(alone, [request])
        assert log.tokens.get(request.id) == want.tokens.get(request.id)
        assert log.text[request.id] == want.text[request.id]
        assert log.ends[request.id].reason == want.ends[request.id].reason
    assert log.ends["4"].completion_tokens == 0  # the end token at once
    assert [p for p in log.progress if p.id == "2"][-1].done == len(asked[2].prompt)


def test_the_engine_and_the_single_stream_agree(fast: LLM) -> None:
    asked = [ask(fast, str(i), "Call me", **kind) for i, kind in enumerate(KINDS)]
    log = run(Engine(fast), asked)
    single = ds4.load("demo", "torch", "cpu", context=CONTEXT)
    for request, kind in zip(asked, KINDS, strict=True):
        options = {"temperature": 0.0, "max_tokens": 8, "top_p": 1.0} | kind
        want = single.generate(list(request.prompt), **options)
        end = log.ends[request.id]
        assert (log.tokens.get(request.id, []), log.text[request.id]) == (want.tokens, want.text)
        assert end.reason == want.finish_reason
        assert end.completion_tokens == want.usage["completion_tokens"]


def test_looking_ahead_and_recorded_sizes_change_nothing(
    fast: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a GPU: steps begin before their tokens are known, and are padded."""
    asked = [ask(fast, str(i), "Call me Ishmael", **kind) for i, kind in enumerate(KINDS)]
    want = run(Engine(fast), asked)
    monkeypatch.setattr(fast.runner.be, "looks_ahead", True, raising=False)
    monkeypatch.setattr(fast.runner.be, "decode_sizes", (1, 4, 8), raising=False)
    engine = Engine(fast)
    engine.warm(users=2)
    got = run(engine, asked)
    assert (got.tokens, got.text) == (want.tokens, want.text)


def test_the_host_is_at_most_a_chunk_ahead(fast: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a device that computes by itself: who comes during a long prompt need not wait for it."""
    be, waits, download = fast.runner.be, [], fast.runner.be.download
    monkeypatch.setattr(be, "looks_ahead", True, raising=False)
    monkeypatch.setattr(be, "download", lambda x: waits.append(1) or download(x))
    engine = Engine(fast, chunk=16)
    engine.submit(Request("long", [9] * 80, SamplingParams(max_tokens=1, temperature=0.0)))
    engine.step()
    assert not waits
    for step in range(4):
        engine.step()
        assert len(waits) == step + 1


def test_random_requests_get_what_each_gets_alone() -> None:
    """The short version of bench.engine_equivalence."""
    many, one = (ds4.load("demo", "torch", "cpu", context=110, slots=slots) for slots in (3, 1))
    verdicts = compare(many, one, count=8, chunk=32, seed=3)
    assert verdicts["equal"] + verdicts["explained"] + verdicts["cancelled"] == 8
    assert verdicts["equal"] >= 4


def test_cancelling_in_every_state_frees_the_slot_within_a_step(fast: LLM) -> None:
    engine, log = Engine(fast, chunk=8), Log()
    for name in ("decodes", "absorbs", "waits", "stays"):
        length = 100 if name == "absorbs" else 3
        engine.submit(
            Request(name, [5 + len(name)] * length, SamplingParams(max_tokens=90, temperature=0.0))
        )
    while "decodes" not in log.tokens:
        log.add(engine)
    assert "absorbs" not in log.tokens
    assert engine.stats().waiting == 2
    for name in ("waits", "absorbs", "decodes", "nobody"):
        engine.cancel(name)
    log.add(engine)
    assert {name: end.reason for name, end in log.ends.items()} == dict.fromkeys(
        ("decodes", "absorbs", "waits"), "cancelled"
    )
    assert engine.stats().running == 1  # the one that waited has a slot already
    engine.cancel("stays")
    drain(engine, log)
    assert engine.stats().finished == {"cancelled": 4}


def test_a_second_turn_extends_the_slot_and_another_answer_rewinds_it(fast: LLM) -> None:
    engine = Engine(fast)
    first = ask(fast, "1", "Once upon a time there was a king who had a daughter", max_tokens=20)
    log = run(engine, [first])
    history = [*first.prompt, *log.tokens["1"]]
    second = Request("2", [*history, 9, 9, 9], first.params)
    log = run(engine, [second])
    assert log.ends["2"].cached_tokens == len(history) - 1  # the last token was never fed
    assert log.tokens == run(Engine(fast), [second]).tokens
    again = run(engine, [second])
    assert again.ends["2"].cached_tokens == len(second.prompt) - 1
    assert again.tokens == log.tokens


def test_what_can_never_run_is_refused(fast: LLM) -> None:
    engine = Engine(fast, limits=Limits(waiting=1, prompt_tokens=50))
    for prompt in ([], [5000], [-1], [3] * 51):
        with pytest.raises(PromptError):
            engine.submit(Request("x", prompt))
    with pytest.raises(PromptError):
        engine.submit(Request("x", [1], SamplingParams(logit_bias={9999: 1.0})))
    engine.submit(ask(fast, "a", "one"))
    with pytest.raises(PromptError, match="ids must differ"):
        engine.submit(ask(fast, "a", "one"))
    with pytest.raises(QueueFull):
        engine.submit(ask(fast, "b", "two"))
    assert drain(engine).ends.keys() == {"a"}


def test_a_failed_step_ends_its_requests_and_the_engine_goes_on(
    fast: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = Engine(fast)
    good = run(engine, [ask(fast, "good", "Once upon")]).tokens["good"]
    with monkeypatch.context() as patch:
        patch.setattr(fast.runner, "run", lambda *a: 1 / 0)
        log = run(engine, [ask(fast, "bad", "Twice")])
    assert log.ends["bad"].reason == "error"
    assert log.ends["bad"].message == "internal error: ZeroDivisionError"
    assert run(engine, [ask(fast, "good", "Once upon")]).tokens["good"] == good


SCHEMA = {
    "type": "object",
    "properties": {"sea": {"type": "boolean"}, "n": {"enum": [12, 345]}},
    "required": ["sea", "n"],
    "additionalProperties": False,
}


def test_grammars_hold_beside_free_text(llm: LLM) -> None:
    engine = Engine(llm)
    compact = {"x-guidance": {"whitespace_flexible": False}}
    schema = Grammar("json_schema", json.dumps(SCHEMA | compact))
    asked = [
        Request("json", llm.encode("Sea:"), SamplingParams(max_tokens=40, seed=1), grammar=schema),
        ask(llm, "free", "The sea was"),
        Request("word", llm.encode("A"), SamplingParams(seed=2), 0, Grammar("regex", "(ab|ba){3}")),
        Request("bad", llm.encode("A"), SamplingParams(), 0, Grammar("json_schema", "{")),
    ]
    log = run(engine, asked)
    answer = json.loads(log.text["json"])
    assert answer.keys() == {"sea", "n"}
    assert answer["n"] in (12, 345)
    assert len(log.text["word"]) == 6
    assert log.ends["bad"].reason == "error"
    assert "json_schema" in (log.ends["bad"].message or "")
    assert log.tokens["free"] == run(Engine(llm), [asked[1]]).tokens["free"]
    engine.close()


def test_prompts_that_begin_alike_are_absorbed_once(llm: LLM) -> None:
    """Four requests at once, three slots: one absorbs what they share, the others copy it."""
    shared = llm.encode("It was the best of times, it was the worst of times, " * 12)[:150]
    asked = [
        Request(str(i), [*shared, 40 + i, 7], SamplingParams(max_tokens=6, temperature=0.0))
        for i in range(4)
    ]
    engine = Engine(llm, chunk=64)
    log = run(engine, asked)
    assert [log.ends[str(i)].cached_tokens for i in range(4)] == [0, 150, 150, 150]
    assert engine.stats().cached_tokens == 450
    for request in asked:
        want = run(Engine(llm, chunk=64), [request])
        assert log.tokens[request.id] == want.tokens[request.id]


def test_a_follower_goes_on_when_its_leader_is_cancelled(fast: LLM) -> None:
    prompt = [3 + i % 50 for i in range(200)]
    params = SamplingParams(max_tokens=4, temperature=0.0)
    engine, log = Engine(fast, chunk=64), Log()
    engine.submit(Request("leader", prompt, params))
    engine.submit(Request("follower", [*prompt, 9], params))
    for _ in range(3):
        log.add(engine)
    assert not log.tokens
    engine.cancel("leader")
    drain(engine, log)
    assert log.ends["follower"].cached_tokens == 192  # what the leader had absorbed by then
    again = run(Engine(fast, chunk=64), [Request("again", [*prompt, 9], params)])
    assert log.tokens["follower"] == again.tokens["again"]


def test_snapshots_bring_back_what_slots_lost(fast: LLM) -> None:
    """A conversation whose slots were taken by others goes on without absorbing it again."""
    engine = Engine(fast, chunk=64, prefixes=PrefixCache(fast.runner, 1 << 28))
    params = SamplingParams(max_tokens=5, temperature=0.0)
    first = Request("1", [3 + i % 50 for i in range(180)], params)
    answer = run(engine, [first]).tokens["1"]
    others = [Request(f"other{i}", [60 + i] * 150, params) for i in range(3)]
    run(engine, others)
    second = Request("2", [*first.prompt, *answer, 8, 8], params)
    log = run(engine, [second])
    assert log.ends["2"].cached_tokens == 180 + len(answer) - 1
    fork = Request("3", [*first.prompt[:140], 9], params)  # leaves the first one half way
    assert run(engine, [fork]).ends["3"].cached_tokens == 128
    assert engine.stats().prefix_bytes > 0
    assert log.tokens["2"] == run(Engine(fast, chunk=64), [second]).tokens["2"]
    engine.close()


def test_snapshots_that_fail_cost_only_time(fast: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = PrefixCache(fast.runner, 1 << 28)
    engine = Engine(fast, chunk=64, prefixes=cache)
    params = SamplingParams(max_tokens=3, temperature=0.0)
    first = Request("1", [3 + i % 50 for i in range(140)], params)
    want = run(engine, [first]).tokens["1"]
    run(engine, [Request(f"other{i}", [60 + i] * 20, params) for i in range(2)])
    for name in ("restore", "keep"):
        monkeypatch.setattr(cache, name, lambda *a: 1 / 0)
    log = run(engine, [Request("2", first.prompt, params)])
    assert log.tokens["2"] == want
    assert log.ends["2"].cached_tokens == 0
