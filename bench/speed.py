"""Speed of the real model's shapes with random weights, beside the floor, the target and the peers.

    python -m bench.speed [--synthetic flash] [--recipes native,q2] [--unique-layers 7]
        [--routing uniform] [--backend cuda] [--device auto] [--batches 1,8,16,32]
        [--contexts 512,32768,131072] [--prompts 512,2048,8192] [--steps 20] [--no-operations]
        [--out bench/results/speed.jsonl]

Every layer is computed; with --unique-layers later ones read the bytes of earlier ones, which the
caches of a GPU are too small to hold. A context is filled with random rows, not run (models.py).
Decode feeds random tokens; its time is the median step, of batch 1 at every context and of every
batch at the shortest. Text is what one user gets, each token read by the host. Prefill runs a
prompt from nothing, in one chunk if memory allows.
"""

import argparse
import json
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ds4.llm import LLM
from ds4.loader import Synthetic
from ds4.plan.memory import Memory, predict
from ds4.runner import Runner

from . import memory, report
from .floors import Goal, goal, prefill_operations, step_bytes
from .machine import Clock, ceilings, describe, wait
from .models import Model, free, open_model
from .operations import by_kernel, operations, trace
from .routing import watch

WARM = 4  # steps before those that count: compilation, capture
MAX_CHUNK = 8192


def main(arguments: list[str] | None = None) -> None:
    args = _arguments(arguments)
    rows: list[dict[str, Any]] = []
    for recipe in args.recipes:
        synthetic = Synthetic(args.synthetic, recipe, args.unique_layers, args.routing)
        before, since = memory.used(args.device), time.perf_counter()
        model = open_model(synthetic, args.backend, args.device)
        limits = ceilings(model.be.device)
        common, first = _common(model, args.backend, limits), len(rows)
        for row in _cases(model, args, limits):
            rows.append(common | row)
            spent, since = time.perf_counter() - since, time.perf_counter()
            report.screen.print(report.line(rows[-1], spent), highlight=False, markup=False)
            _keep(args.out, rows[-1])
        memory.show(report.screen, model, before, args.contexts[0])
        if args.operations:
            apart = common | _operations(model, args.contexts[0], limits)
            rows[first]["kernels"] = apart.get("kernels")
            _keep(args.out, apart)
        del model
        free(args.device)
    report.targets(rows)


def _keep(file: str | None, row: dict[str, Any]) -> None:
    """Append a row at once: a later case may fail."""
    if file:
        with Path(file).open("a") as out:
            out.write(json.dumps(row) + "\n")


def _arguments(given: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="speed with random weights")
    parser.add_argument("--synthetic", default="flash", help="flash, tiny, demo or a folder")
    parser.add_argument("--recipes", type=lambda text: text.split(","), default=["native", "q2"])
    parser.add_argument("--unique-layers", type=_layers, default=7, help="a number or all")
    parser.add_argument("--routing", choices=("uniform", "skewed"), default="uniform")
    parser.add_argument("--backend", default="cuda")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--batches", type=_numbers, default=[1, 8, 16, 32])
    parser.add_argument("--contexts", type=_numbers, default=[512, 32_768, 131_072])
    parser.add_argument("--prompts", type=_numbers, default=[512, 2048, 8192])
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--no-operations", dest="operations", action="store_false")
    parser.add_argument("--out", help="append a JSON line for each row")
    return parser.parse_args(given)


def _numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",") if part]


def _layers(text: str) -> int | None:
    return None if text == "all" else int(text)


def _common(model: Model, backend: str, limits: dict[str, float]) -> dict[str, Any]:
    return {
        "bench": "speed",
        "model": model.synthetic.model,
        "recipe": model.synthetic.recipe,
        "routing": model.synthetic.routing,
        "layers": model.cfg.num_hidden_layers,
        "unique_layers": len(set(model.source.same_as.values())),
        "backend": backend,
        "gb_s": round(limits["bandwidth"] / 1e9),
        "tflop_s": round(limits["operations"] / 1e12, 1),
        **describe(model.be.device),
    }


# measuring


def _cases(
    model: Model, args: argparse.Namespace, limits: dict[str, float]
) -> Iterator[dict[str, Any]]:
    shortest, *longer = args.contexts
    cases = [(batch, shortest) for batch in args.batches] + [(1, context) for context in longer]
    first = None
    for batch, context in cases:
        row = decode(model, batch, context, args.steps, limits)
        first = first or row["tok_s"]
        yield row | _judged(goal(model, "decode", batch, context), row["tok_s"], first)
        free(model.be.device)
    row = text(model, shortest, args.steps, limits)
    yield row | _judged(goal(model, "decode", 1, shortest), row["tok_s"], first)
    for prompt in args.prompts:
        row = prefill(model, prompt, limits)
        yield row | _judged(goal(model, "prefill", 1, prompt), row["tok_s"], first)
        free(model.be.device)


def _judged(wanted: Goal, speed: float, first: float | None) -> dict[str, Any]:
    target = wanted.target
    if wanted.share_of and first:
        target = round(wanted.share_of * first, 1)
    return {"target": target, "peer_tok_s": wanted.peer, "peer": wanted.engine or None}


def decode(
    model: Model, batch: int, context: int, steps: int, limits: dict[str, float]
) -> dict[str, Any]:
    """One token for each of `batch` sequences a step, up to `context` tokens in each."""
    more = WARM + steps + 4
    runner = model.runner(batch, context, min(256, context), length=max(1, context - more))
    seen = watch(model, runner)

    def step() -> None:
        runner.run(model.next_tokens(batch), pad_to=batch)

    for _ in range(WARM):
        step()
    clock = Clock(model.be.device)
    clock.mark()
    for _ in range(steps):
        step()
        clock.mark()
    seconds = statistics.median(clock.intervals())
    floor = step_bytes(model, batch, batch, context, seen.experts) / limits["bandwidth"]
    routed = {"experts": round(seen.experts, 1), "repeated": round(seen.repeated, 3)}
    return _measured("decode", batch, context, batch, seconds, floor) | routed


def text(model: Model, context: int, steps: int, limits: dict[str, float]) -> dict[str, Any]:
    """Greedy text of one sequence as a user gets it, with the host in the loop."""
    prompt = max(1, context - 2 * steps - WARM)
    runner = model.runner(1, context, min(256, context))
    llm = LLM(runner)
    llm.generate(model.tokens(prompt), max_tokens=WARM, temperature=0)
    made = llm.generate(model.tokens(prompt), max_tokens=2 * steps, temperature=0)
    seconds = made.timings["decode_s"] / max(1, len(made.tokens) - 1)
    chosen = model.cfg.num_experts_per_tok
    floor = step_bytes(model, 1, 1, context, chosen) / limits["bandwidth"]
    return _measured("text", 1, context, 1, seconds, floor)


def _measured(
    kind: str, batch: int, tokens: int, done: int, seconds: float, floor: float
) -> dict[str, Any]:
    """A row: `done` tokens in so many seconds, and the least that they take."""
    return {
        "kind": kind,
        "batch": batch,
        "tokens": tokens,
        "tok_s": round(done / seconds, 1),
        "ms": round(seconds * 1e3, 3),
        "floor_ms": round(floor * 1e3, 3),
        "floor_tok_s": round(done / floor, 1),
        "share": round(floor / seconds, 3),
    }


def prefill(model: Model, prompt: int, limits: dict[str, float]) -> dict[str, Any]:
    """A whole prompt from an empty cache."""
    chunk = min(prompt, MAX_CHUNK)
    runner = model.runner(1, prompt, chunk)
    held = memory.used(model.be.device)
    memory.reset_peak(model.be.device)
    seconds = _prefill_seconds(model, runner, prompt)
    work = prefill_operations(model, prompt) / limits["operations"]
    nbytes = step_bytes(model, prompt, 0, prompt, model.cfg.n_routed_experts)
    floor = max(work, nbytes / limits["bandwidth"])
    return _measured("prefill", 1, prompt, prompt, seconds, floor) | {
        "chunk": chunk,
        "working_mb": round((memory.peak(model.be.device) - held) / 1e6, 1),
        "predicted_working_mb": round(_predicted(model, prompt, chunk).working / 1e6, 1),
    }


def _predicted(model: Model, context: int, chunk: int) -> Memory:
    recipe = model.source.recipe
    assert recipe is not None
    return predict(model.cfg, recipe, context, 1, chunk)


def _prefill_seconds(model: Model, runner: Runner, prompt: int, runs: int = 3) -> float:
    ids = model.tokens(prompt)
    times = []
    for _ in range(runs + 1):
        runner.rewind(0, 0)
        clock = Clock(model.be.device)
        clock.mark()
        for start in range(0, prompt, runner.max_chunk):
            runner.run({0: ids[start : start + runner.max_chunk]})
        clock.mark()
        times.append(clock.intervals()[0])
    return statistics.median(times[1:])


# taking apart


def _operations(model: Model, context: int, limits: dict[str, float]) -> dict[str, Any]:
    """Where a decoded token's time goes: shown, and as a row."""
    length = max(1, context - WARM - 2)
    runner = model.runner(1, context, min(256, context), length=length)
    found = operations(model, runner, model.next_tokens(1))
    title = f"{model.synthetic.recipe}: one decoded token at {context:,}"
    report.costs(title, found, limits["bandwidth"])
    row = {
        "kind": "operations",
        "batch": 1,
        "tokens": context,
        "operations": [report.entry(cost, limits["bandwidth"]) for cost in found],
    }
    if model.be.device.startswith("cuda"):
        row |= _kernels(model, runner)
    free(model.be.device)
    return row


def _kernels(model: Model, runner: Runner) -> dict[str, Any]:
    """The kernels of a step as the runner really runs it, once it is compiled and captured."""

    def step() -> None:
        runner.run(model.next_tokens(1), pad_to=1)
        wait(model.be.device)

    for _ in range(WARM):
        step()
    clock = Clock(model.be.device)
    clock.mark()
    step()
    clock.mark()
    found = by_kernel(trace(step))
    report.kernels(found, clock.intervals()[0])
    return {
        "kernels": sum(count for count, _ in found.values()),
        "kernel_us": round(sum(seconds for _, seconds in found.values()) * 1e6, 1),
    }


if __name__ == "__main__":
    main()
