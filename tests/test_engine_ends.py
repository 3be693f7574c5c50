"""How requests end at the edges: by what a flush brings, or before they began."""

import threading

import pytest

import ds4
from ds4 import LLM, SamplingParams
from ds4.engine import Engine
from ds4.engine.api import Event, Finished, Grammar, Request


@pytest.fixture(scope="module")
def llm() -> LLM:
    return ds4.load("demo", "reference", "cpu", context=64)


def drained(engine: Engine) -> list[Event]:
    events: list[Event] = []
    while engine.has_work():
        events += engine.step()
    return events


def test_a_stop_string_that_only_the_end_of_the_text_completes(llm: LLM) -> None:
    """U+FFFD for the bytes of a character that never became whole."""
    assert llm.tokenizer is not None
    pieces = map(llm.tokenizer.token_bytes, range(llm.tokenizer.size))
    opens = next(t for t, piece in enumerate(pieces) if len(piece) == 1 and piece[0] >= 0xE0)
    options = {"max_tokens": 1, "temperature": 0.0, "logit_bias": {opens: 1e5}, "stop": ["\ufffd"]}
    alone = llm.generate("It was", **options)
    assert (alone.text, alone.finish_reason, alone.tokens) == ("", "stop", [opens])
    engine = Engine(llm)
    engine.submit(Request("a", llm.encode("It was"), SamplingParams(**options)))
    last = drained(engine)[-1]
    assert isinstance(last, Finished)
    assert (last.reason, last.stop, last.text) == ("stop", "\ufffd", "")


def test_a_request_whose_grammar_finds_no_thread_leaves_the_queue(
    llm: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, asked = Engine(llm), Request("a", [5, 6, 7], grammar=Grammar("json_object"))

    def none(self: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", none)
        with pytest.raises(RuntimeError, match="new thread"):
            engine.submit(asked)
    stats = engine.stats()
    assert (stats.waiting, stats.waiting_tokens, engine.has_work()) == (0, 0, False)
    engine.submit(Request("a", [5, 6, 7], SamplingParams(max_tokens=2)))  # the name is free
    assert isinstance(drained(engine)[-1], Finished)
