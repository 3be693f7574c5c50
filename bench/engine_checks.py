"""What bench.engine_equivalence checks besides: the choice of tokens, on any backend.

operations  mask, adjust, gather and greedy choice of several rows: the reference's bits
grammar     requests held to grammars beside free ones: every answer has the form
logprobs    of greedy tokens: the best, and what the logits of the whole text say
company     a token's logits alone and beside other rows: in exact mode on a GPU the same bits
fan-out     the same long prompt several times at once: absorbed once, each seed its own text
"""

import json
import re
from collections.abc import Iterable

import numpy as np

from ds4 import LLM, SamplingParams
from ds4.backend import Backend, open_backend
from ds4.engine import Engine
from ds4.engine.api import Finished, Grammar, Progress, Request
from ds4.sampler import TokenLogprob

NUMBERS = r"[0-9]{3}-[a-f]{2}"
SCHEMA = json.dumps(
    {
        "type": "object",
        "properties": {"a": {"type": "integer"}, "b": {"enum": ["x", "y"]}},
        "required": ["a", "b"],
        "additionalProperties": False,
    }
)
GRAMMARS = Grammar("regex", NUMBERS), Grammar("json_schema", SCHEMA), None


def check(many: LLM, noise: float) -> None:
    """Raises AssertionError with what differs; `many` has several slots."""
    be, cfg = many.runner.be, many.config
    operations(be, cfg.vocab_size, many.runner.slots)
    apart = company(many)
    print("largest difference of a token's logits from those alone:", apart, flush=True)
    if be.name == "cuda" and be.cache == "exact":
        assert not any(apart.values()), "a token's logits depend on its company"
    engine = Engine(many)
    grammars(engine)
    logprobs(many, noise)
    fan_out(Engine(many), many.context)
    print("operations, grammars, logprobs and fan-out are right", flush=True)


def operations(be: Backend, vocabulary: int, rows: int) -> None:
    reference, rng = open_backend("reference"), np.random.default_rng(0)
    logits = (3 * rng.standard_normal((rows, vocabulary))).astype(np.float32)
    allowed = rng.integers(-(1 << 31), 1 << 31, (rows, -(-vocabulary // 32))).astype(np.int32)
    ids = np.stack([rng.permutation(vocabulary)[:40] for _ in range(rows)]).astype(np.int32)
    ids[0, 7:] = -1
    factor = rng.uniform(0.5, 2, ids.shape).astype(np.float32)
    offset = rng.standard_normal(ids.shape).astype(np.float32)

    def all_of(b: Backend) -> dict[str, np.ndarray]:
        up = b.upload
        masked = b.mask(up(logits), up(allowed))
        adjusted = b.adjust(up(logits), up(ids), up(factor), up(offset))
        zero, top_k = up(np.zeros(rows, np.float32)), up(np.zeros(rows, np.int32))
        greedy = b.sample(masked, zero, top_k, up(np.ones(rows, np.float32)), zero, zero)
        parts = [up(ids[0]), up(ids[1 % rows, :3])]
        gathered = b.gather(parts, up(np.array([41, 2, 0, 42, 2], np.int32)))
        return {
            "mask": b.download(masked),
            "adjust": b.download(adjusted),
            "greedy": b.download(greedy),
            "gather": b.download(gathered),
        }

    want = all_of(reference)
    for name, got in all_of(be).items():
        assert np.array_equal(got, want[name]), f"{name} differs from the reference"


def grammars(engine: Engine) -> None:
    requests = [
        Request(
            str(number),
            [5 + number] * (1 + 7 * number),
            SamplingParams(temperature=1.0, seed=number, max_tokens=60 if grammar else 12),
            grammar=grammar,
        )
        for number, grammar in enumerate(GRAMMARS * 3)
    ]
    texts, ends, _ = run(engine, requests)
    for request in requests:
        text, reason = texts[request.id], ends[request.id].reason
        if request.grammar is None:
            continue
        assert reason in ("stop", "length"), f"{request.grammar.kind}: {ends[request.id]}"
        if reason == "stop" and request.grammar.kind == "regex":
            assert re.fullmatch(NUMBERS, text), f"{text!r} is not {NUMBERS}"
        elif reason == "stop":
            found = json.loads(text)
            assert isinstance(found["a"], int), text
            assert found["b"] in "xy", text
    stopped = sum(ends[r.id].reason == "stop" for r in requests if r.grammar)
    assert stopped >= 3, f"{stopped} of 6 grammars came to their end"


def logprobs(llm: LLM, noise: float) -> None:
    rng = np.random.default_rng(1)
    requests = [
        Request(
            str(number),
            rng.integers(3, llm.config.vocab_size - 80, 20 + 30 * number).tolist(),
            SamplingParams(temperature=0.0, max_tokens=10, logprobs=3),
        )
        for number in range(3)
    ]
    _, _, known = run(Engine(llm), requests)
    for request in requests:
        chosen = known[request.id]
        tokens = [one.token for one in chosen]
        rows = llm.logits([*request.prompt, *tokens])[len(request.prompt) - 1 : -1]
        rows = rows.astype(np.float64)
        rows -= np.log(np.exp(rows - rows.max(1, keepdims=True)).sum(1, keepdims=True))
        rows -= rows.max(1, keepdims=True)
        for one, row in zip(chosen, rows, strict=True):
            assert one.top[0] == (one.token, one.logprob), one
            for token, logprob in one.top:
                gap = logprob - one.logprob - (row[token] - row[one.token])
                assert abs(gap) <= 10 * noise, f"{gap} of a log probability"


def fan_out(engine: Engine, context: int) -> None:
    prompt = np.random.default_rng(2).integers(3, 200, context * 2 // 3).tolist()
    requests = [
        Request(str(n), prompt, SamplingParams(temperature=1.0, seed=n // 2, max_tokens=12))
        for n in range(4)
    ]
    texts, ends, _ = run(engine, requests)
    absorbed = sum(end.prompt_tokens - end.cached_tokens for end in ends.values())
    assert absorbed < len(prompt) + 3 * 128, f"{absorbed} tokens were absorbed of {len(prompt)}"
    assert texts["2"] == texts["3"], "the same seed, another text"
    assert texts["0"] != texts["2"], "another seed, the same text"


def company(llm: LLM) -> dict[str, float]:
    """Largest difference of logits, by the step that a token is in; its state is the same."""
    runner, start, count = llm.runner, 30, 9
    ids = np.random.default_rng(3).integers(3, 200, (runner.slots, start + count)).tolist()

    def begin(slots: Iterable[int]) -> None:
        for slot in slots:
            runner.rewind(slot, 0)
            runner.run({slot: ids[slot][:start]})

    def logits(tokens: dict[int, list[int]], every_row: bool = False) -> np.ndarray:
        return runner.be.download(runner.run(tokens, every_row=every_row)).copy()

    begin([0])
    alone = np.concatenate([logits({0: [token]}) for token in ids[0][start:]])
    found: dict[str, float] = {}
    for rows in (2, 5, count):
        begin([0])
        got = logits({0: ids[0][start : start + rows]}, every_row=True)
        found[f"{rows} rows"] = float(f"{np.abs(got - alone[:rows]).max():.1e}")
    for users in range(2, runner.slots + 1):
        begin(range(users))
        got = logits({slot: [ids[slot][start]] for slot in range(users)})
        found[f"{users} users"] = float(f"{np.abs(got[0] - alone[0]).max():.1e}")
    llm._forget()
    return found


Ran = tuple[dict[str, str], dict[str, Finished], dict[str, list[TokenLogprob]]]


def run(engine: Engine, requests: Iterable[Request]) -> Ran:
    """Text, end and log probabilities of each request, all submitted at once."""
    texts: dict[str, str] = {}
    ends: dict[str, Finished] = {}
    known: dict[str, list[TokenLogprob]] = {}
    for request in requests:
        engine.submit(request)
        texts[request.id], known[request.id] = "", []
    while engine.has_work():
        for event in engine.step():
            if isinstance(event, Progress):
                continue
            texts[event.id] += event.text
            if isinstance(event, Finished):
                ends[event.id] = event
            else:
                known[event.id] += event.logprobs or []
    return texts, ends, known
