"""What users of the engine get, beside what the model alone can do, in one run.

    python -m bench.serving [--synthetic flash] [--recipe native] [--unique-layers 7]
        [--backend cuda] [--device auto] [--users 1,4,8,16,32] [--prompt 512] [--tokens 48]
        [--long 32768] [--restore 100000] [--out bench/results/serving.jsonl]

decode   tokens a second of all users together while all of them decode. Raw is the model fed the
         very same tokens in the same batches, without choosing any and without waiting for the host
alone    greedy logits of one user among others, against the same user alone: bits
ttft     from submission to the first token, all users at once
mixed    between two tokens of a user, before and while a long prompt is absorbed; the prompt's own
         time a chunk, measured without the others
restore  a prefix put back from memory and from disk
"""

import argparse
import gc
import json
import statistics
import sys
import tempfile
import time
import traceback
from collections import defaultdict
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from ds4.engine import Engine
from ds4.engine.api import Finished, Progress, Request, Tokens
from ds4.engine.prefix import PrefixCache
from ds4.loader import Synthetic
from ds4.runner import Runner
from ds4.sampler import SamplingParams

from .machine import describe, wait
from .models import Model, free, open_model

screen = Console(width=150)
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


def main() -> None:
    args = _arguments()
    synthetic = Synthetic(args.synthetic, args.recipe, args.unique_layers)
    start = time.perf_counter()
    model = open_model(synthetic, args.backend, args.device)
    most = max(args.users)
    room = max(512, args.prompt + 2 * args.tokens, args.long and args.long + 512)
    runner = Runner(model.be, model.cfg, model.weights, room, most)
    common = {
        "bench": "serving",
        "model": args.synthetic,
        "recipe": args.recipe,
        "unique_layers": args.unique_layers,
        "backend": args.backend,
        **describe(model.be.device),
    }
    screen.print(
        f"{model.be.device}: model and {most} slots in {time.perf_counter() - start:.1f} s"
    )
    first, later = args.users[:3], args.users[3:]
    few = min(8, most)
    steps = [
        *(partial(decode, model, runner, users, args.tokens) for users in first),
        partial(alone, model, runner, few, args.tokens),
        *(
            [partial(mixed, model, runner, min(8, most - 1), args.prompt, args.long)]
            * (args.long > 0)
        ),
        *(partial(ttft, model, runner, users, args.prompt) for users in args.users if users <= 8),
        *(partial(decode, model, runner, users, args.tokens) for users in later),
        partial(decode, model, runner, few, args.tokens, temperature=1.0, top_p=0.95),
    ]
    failed = 0
    for step in steps:
        screen.print(f"{step.func.__name__} {step.args[2:]} ...")
        try:
            _tell(common | step(), args.out, start)
        except Exception:  # the other rows may still be had, and a run is dear
            traceback.print_exc()
            failed = 1
    if args.restore:
        del runner, step
        steps.clear()
        gc.collect()
        free(model.be.device)
        _tell(common | restore(model, args.restore), args.out, start)
    sys.exit(failed)


def _arguments() -> argparse.Namespace:
    def numbers(text: str) -> list[int]:
        return [int(part) for part in text.split(",") if part]

    parser = argparse.ArgumentParser(description="serving, with random weights")
    parser.add_argument("--synthetic", default="flash", help="flash, tiny, demo or a folder")
    parser.add_argument("--recipe", default="native")
    parser.add_argument("--unique-layers", type=int, default=None)
    parser.add_argument("--backend", default="cuda")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--users", type=numbers, default=[1, 4, 8, 16, 32])
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--long", type=int, default=32_768, help="0: no mixed case")
    parser.add_argument("--restore", type=int, default=100_000, help="0: not measured")
    parser.add_argument("--out", help="append a JSON line for each row")
    return parser.parse_args()


def _tell(row: Row, file: str | None, start: float) -> None:
    about = {k: v for k, v in row.items() if k in _SHOWN and v is not None}
    screen.print(f"[{time.perf_counter() - start:5.1f} s]", about, highlight=False)
    if file:
        Path(file).parent.mkdir(parents=True, exist_ok=True)
        with Path(file).open("a") as out:
            out.write(json.dumps(row) + "\n")


# measuring


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


def restore(model: Model, length: int) -> Row:
    """A snapshot of a long sequence, whose rows are random: it was never run."""
    runner = model.runner(1, length + 256, 2048, length)
    runner.identity = lambda: "synthetic"
    tokens = model.tokens(length)
    with tempfile.TemporaryDirectory() as folder:
        cache = PrefixCache(runner, 1 << 34, folder, 1 << 34)
        start = time.perf_counter()
        cache.keep(runner, 0, tokens)
        kept = time.perf_counter() - start
        cache.flush()
        memory = _restore(cache, runner, tokens)
        cache.close()
        again = PrefixCache(runner, 1 << 34, folder, 1 << 34)
        disk = _restore(again, runner, tokens)
        nbytes = cache.bytes
        again.close()
    return {
        "kind": "restore",
        "tokens": length,
        "mb": round(nbytes / 1e6),
        "keep_s": round(kept, 3),
        "memory_s": round(memory, 3),
        "disk_s": round(disk, 3),
        "memory_gb_s": round(nbytes / memory / 1e9, 2),
        "disk_gb_s": round(nbytes / disk / 1e9, 2),
    }


def _restore(cache: PrefixCache, runner: Runner, tokens: list[int]) -> float:
    wait(runner.be.device)
    start = time.perf_counter()
    found = cache.resume(runner, 0, [*tokens, 5])
    wait(runner.be.device)
    assert found == len(tokens)
    return time.perf_counter() - start


_SHOWN = {
    "kind", "users", "sampling", "tok_s", "raw_tok_s", "share_of_raw", "warm_up_s", "same_tokens",
    "decode_difference", "packed_prefill_difference", "tokens", "p50_s", "p95_s", "chunk_ms",
    "calm_p50_ms", "busy_p50_ms", "busy_p99_ms", "p99_of_chunk", "prefill_alone_tok_s",
    "prefill_busy_tok_s", "mb", "keep_s", "memory_s", "disk_s", "memory_gb_s", "disk_gb_s",
}  # fmt: skip


if __name__ == "__main__":
    main()
