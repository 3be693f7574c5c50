"""What bench.serving measures: an engine's users, beside what the model alone can do."""

import json
import statistics
import time
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import numpy as np

from ds4.engine import Engine
from ds4.engine.api import Finished, Progress, Request, Tokens
from ds4.runner import Runner
from ds4.sampler import SamplingParams

from .machine import wait
from .models import Model

Row = dict[str, Any]


class Watch:
    """Runs an engine and notes when each token came."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.times: dict[str, list[float]] = defaultdict(list)
        self.tokens: dict[str, list[int]] = defaultdict(list)
        self.submitted: dict[str, float] = {}
        self.chunks: dict[str, list[float]] = defaultdict(list)
        self.ended: dict[str, Finished] = {}

    def submit(self, name: str, prompt: Sequence[int], tokens: int, **options: Any) -> None:
        params = SamplingParams(max_tokens=tokens, logit_bias={1: -100.0}, **options)
        self.submitted[name] = time.perf_counter()
        self.engine.submit(Request(name, prompt, params))

    def step(self) -> None:
        events = self.engine.step()
        now = time.perf_counter()
        for event in events:
            if isinstance(event, Tokens):
                self.times[event.id].append(now)
                self.tokens[event.id] += event.tokens
            elif isinstance(event, Progress):
                self.chunks[event.id].append(now)
            else:
                self.ended[event.id] = event

    def drain(self) -> "Watch":
        while self.engine.has_work():
            self.step()
        return self

    def gaps(self, names: Sequence[str], start: float, end: float) -> list[float]:
        """Seconds between tokens of these users that came in a span of time."""
        return [
            b - a
            for name in names
            for a, b in zip(self.times[name], self.times[name][1:], strict=False)
            if start <= b <= end
        ]


def decode(model: Model, runner: Runner, users: int, tokens: int, **options: Any) -> Row:
    """All users decode together; then the model is fed the same tokens."""
    options = options or {"temperature": 0.0}
    prompts = [model.tokens(16 + 3 * user) for user in range(users)]
    begun = time.perf_counter()
    for count in (6, tokens):  # the first compiles and records
        warm, begun = time.perf_counter() - begun, time.perf_counter()
        watch = Watch(Engine(runner))
        for user, prompt in enumerate(prompts):
            watch.submit(str(user), prompt, count, **options)
        watch.drain()
    first = max(times[0] for times in watch.times.values())
    last = min(times[-1] for times in watch.times.values())
    made = sum(sum(first < at <= last for at in times) for times in watch.times.values())
    served = made / (last - first)
    raw = _raw(runner, prompts, [watch.tokens[str(user)] for user in range(users)])
    return {
        "kind": "decode",
        "users": users,
        "sampling": json.dumps(options),
        "tok_s": round(served, 1),
        "raw_tok_s": round(raw, 1),
        "share_of_raw": round(served / raw, 3),
        "warm_up_s": round(warm, 2),
    }


def _raw(runner: Runner, prompts: list[list[int]], made: list[list[int]]) -> float:
    """Tokens a second of decode steps whose tokens are known beforehand."""
    device, users = runner.be.device, len(prompts)
    for slot in range(users):
        runner.rewind(slot, 0)
    runner.run(dict(enumerate(prompts)))  # as the engine does: nothing new is compiled
    seconds = []
    count = min(map(len, made)) - 1
    for _ in range(2):
        wait(device)
        start = time.perf_counter()
        for i in range(count):
            logits = runner.run({slot: [made[slot][i]] for slot in range(users)}, pad_to=users)
        wait(device)
        seconds.append(time.perf_counter() - start)
        for slot, prompt in enumerate(prompts):
            runner.rewind(slot, len(prompt))
    runner.be.download(logits)
    return users * count / min(seconds)


def alone(model: Model, runner: Runner, users: int, tokens: int) -> Row:
    """The same requests together and one at a time: tokens, and the bits of a step's logits."""
    prompts = [model.tokens(100 + 17 * user) for user in range(users)]
    engine = Engine(runner)
    together = Watch(engine)
    for user, prompt in enumerate(prompts):
        together.submit(str(user), prompt, tokens, temperature=0.0)
    together.drain()
    same = 0
    for user, prompt in enumerate(prompts):
        single = Watch(Engine(runner))  # with empty slots
        single.submit(str(user), prompt, tokens, temperature=0.0)
        same += single.drain().tokens[str(user)] == together.tokens[str(user)]
    be = runner.be
    logits = {}
    for group in ([[slot] for slot in range(users)], [list(range(users))]):
        for packed in (False, True):
            for slot, prompt in enumerate(prompts):
                runner.rewind(slot, 0)
                if not packed:
                    runner.run({slot: prompt})
            for start in range(0, users if packed else 0, 4):
                runner.run({slot: prompts[slot] for slot in range(start, min(start + 4, users))})
            rows = [be.download(runner.run({s: [7] for s in slots}, len(slots))) for slots in group]
            logits[len(group), packed] = np.concatenate([np.array(row) for row in rows])
    want = logits[users, False]
    scale = np.abs(want).max()
    return {
        "kind": "alone",
        "users": users,
        "same_tokens": f"{same} of {users}",
        "decode_difference": float(np.abs(logits[1, False] - want).max() / scale),
        "packed_prefill_difference": float(np.abs(logits[users, True] - want).max() / scale),
    }


def ttft(model: Model, runner: Runner, users: int, prompt: int, rounds: int = 4) -> Row:
    """All users submit at once, on an idle engine."""
    seconds = []
    for number in range(rounds + 1):
        watch = Watch(Engine(runner))
        for user in range(users):
            watch.submit(str(user), model.tokens(prompt), 4, temperature=0.0)
        watch.drain()
        if number:
            seconds += [watch.times[name][0] - at for name, at in watch.submitted.items()]
    return {
        "kind": "ttft",
        "users": users,
        "tokens": prompt,
        "p50_s": round(float(np.percentile(seconds, 50)), 3),
        "p95_s": round(float(np.percentile(seconds, 95)), 3),
    }


def mixed(model: Model, runner: Runner, users: int, prompt: int, long: int) -> Row:
    """A long prompt arrives among users who decode."""
    prompts = [model.tokens(prompt) for _ in range(users)]
    length = model.tokens(long)
    for _ in range(2):  # the first compiles
        own = Watch(Engine(runner))
        own.submit("long", length, 1, temperature=0.0)
        own.drain()
    chunk = (own.times["long"][0] - own.submitted["long"]) / len(own.chunks["long"])
    watch = Watch(Engine(runner))
    names = [str(user) for user in range(users)]
    for name, ids in zip(names, prompts, strict=True):
        watch.submit(name, ids, runner.context - prompt, temperature=0.0)
    while min((len(watch.times[name]) for name in names), default=0) < 20:
        watch.step()
    calm = watch.gaps(names, 0.0, time.perf_counter())
    watch.submit("long", length, 1, temperature=0.0)  # with two it would compile another shape
    while "long" not in watch.ended:
        watch.step()
    start, end = watch.submitted["long"], watch.times["long"][0]
    busy = watch.gaps(names, start, end)
    for name in names:
        watch.engine.cancel(name)
    watch.drain()
    p99 = float(np.percentile(busy, 99))
    return {
        "kind": "mixed",
        "users": users,
        "tokens": long,
        "chunk_ms": round(chunk * 1e3, 1),
        "calm_p50_ms": round(statistics.median(calm) * 1e3, 1),
        "busy_p50_ms": round(statistics.median(busy) * 1e3, 1),
        "busy_p99_ms": round(p99 * 1e3, 1),
        "p99_of_chunk": round(p99 / chunk, 2),
        "prefill_alone_tok_s": round(long / (own.times["long"][0] - own.submitted["long"])),
        "prefill_busy_tok_s": round(long / (end - start)),
    }
