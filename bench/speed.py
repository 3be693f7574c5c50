"""Speed of the real model's shapes with random weights, beside the floor, the target and the peers.

    python -m bench.speed [--synthetic flash] [--recipes native,q2] [--unique-layers 7]
        [--routing uniform] [--backend cuda] [--device auto] [--batches 1,8,16,32]
        [--contexts 512,32768,131072] [--prompts 512,2048,8192] [--steps 20] [--no-operations]
        [--out bench/results/speed.jsonl]

Every layer is computed; with --unique-layers later ones read the bytes of earlier ones, which the
caches of a GPU are too small to hold. A context is filled with random rows, not run (models.py).
Decode feeds random tokens: its time is the median step, batch 1 at every context, every batch at
the shortest. Prefill runs a prompt from nothing, in one chunk if memory allows.
"""

import argparse
import json
import statistics
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from ds4.loader import Synthetic
from ds4.runner import Runner

from . import memory
from .floors import Goal, goal, prefill_operations, step_bytes
from .machine import Clock, ceilings, describe, wait
from .models import Model, free, open_model
from .operations import Cost, by_kernel, kernels, operations, trace
from .routing import watch

WARM = 4  # steps before those that count: compilation, capture
MAX_CHUNK = 8192
screen = Console(width=150)


def main(arguments: list[str] | None = None) -> None:
    args = _arguments(arguments)
    rows: list[dict[str, Any]] = []
    for recipe in args.recipes:
        synthetic = Synthetic(args.synthetic, recipe, args.unique_layers, args.routing)
        before = memory.used(args.device)
        model = open_model(synthetic, args.backend, args.device)
        limits = ceilings(model.be.device)
        common = _common(model, args.backend, limits)
        for row in _cases(model, args, limits):
            rows.append(common | row)
            screen.print(_line(rows[-1]), highlight=False)
        if args.operations:
            _show_operations(model, args, limits)
        memory.show(screen, model, before, args.contexts[0])
        del model
        free(args.device)
    _show(rows)
    if args.out:
        with Path(args.out).open("a") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)


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
    nbytes = step_bytes(model, batch, batch, context, seen.experts)
    floor = nbytes / limits["bandwidth"]
    return {
        "kind": "decode",
        "batch": batch,
        "tokens": context,
        "tok_s": round(batch / seconds, 1),
        "ms": round(seconds * 1e3, 3),
        "floor_ms": round(floor * 1e3, 3),
        "floor_tok_s": round(batch / floor, 1),
        "share": round(floor / seconds, 3),
        "experts": round(seen.experts, 1),
        "repeated": round(seen.repeated, 3),
        "kernels": _kernels(model, step),
    }


def prefill(model: Model, prompt: int, limits: dict[str, float]) -> dict[str, Any]:
    """A whole prompt from an empty cache."""
    chunk = min(prompt, MAX_CHUNK)
    runner = model.runner(1, prompt, chunk)
    seconds = _prefill_seconds(model, runner, prompt)
    work = prefill_operations(model, prompt) / limits["operations"]
    nbytes = step_bytes(model, prompt, 0, prompt, model.cfg.n_routed_experts)
    floor = max(work, nbytes / limits["bandwidth"])
    return {
        "kind": "prefill",
        "batch": 1,
        "tokens": prompt,
        "chunk": chunk,
        "tok_s": round(prompt / seconds, 1),
        "ms": round(seconds * 1e3, 3),
        "floor_ms": round(floor * 1e3, 3),
        "floor_tok_s": round(prompt / floor, 1),
        "share": round(floor / seconds, 3),
    }


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


def _kernels(model: Model, step: Callable[[], None]) -> int | None:
    """Pieces of device work for one step; None on a CPU."""
    if not model.be.device.startswith("cuda"):
        return None

    def run() -> None:
        step()
        wait(model.be.device)

    return len(kernels(trace(run)))


# showing


def _line(row: dict[str, Any]) -> str:
    return (
        f"{row['recipe']} {row['kind']} batch {row['batch']} tokens {row['tokens']:,}: "
        f"{row['tok_s']:,} tok/s, {row['ms']} ms, floor {row['floor_ms']} ms"
    )


def _show(rows: list[dict[str, Any]]) -> None:
    first = rows[0]
    title = (
        f"{first['model']}, {first['layers']} layers ({first['unique_layers']} unique), "
        f"{first['routing']} routing; {first['device']}, driver {first['driver']}, "
        f"torch {first['torch']}, triton {first['triton']}, commit {first['commit']}, "
        f"{first['gb_s']:,} GB/s, {first['tflop_s']:,} TFLOP/s"
    )
    names = (
        ("recipe", "recipe"), ("kind", ""), ("batch", "batch"), ("tokens", "tokens"),
        ("tok_s", "tok/s"), ("target", "target"), ("ms", "ms"), ("floor_ms", "floor ms"),
        ("share", "share"), ("kernels", "kernels"), ("experts", "experts"),
        ("peer_tok_s", "best peer"), ("peer", ""),
    )  # fmt: skip
    table = Table(*(heading for _, heading in names), title=title, title_justify="left")
    for row in rows:
        table.add_row(*(_cell(row.get(name)) for name, _ in names))
    screen.print(table)


def _cell(value: Any) -> str:
    return "" if value is None else f"{value:,}" if isinstance(value, int | float) else str(value)


def _show_operations(model: Model, args: argparse.Namespace, limits: dict[str, float]) -> None:
    """Where a decode step at batch 1 and the longest prompt spend their time."""
    context = args.contexts[0]
    length = max(1, context - 2)
    runner = model.runner(1, context, min(256, context), length=length)
    costs = operations(model, runner, {0: model.tokens(1)})
    _costs(f"{model.synthetic.recipe}: one decoded token, context {context}", costs, limits)
    if model.be.device.startswith("cuda"):
        _top_kernels(model, runner)
    free(model.be.device)


def _costs(title: str, costs: list[Cost], limits: dict[str, float]) -> None:
    table = Table("operation", "calls", "kernels", "us", "MB", "floor us", "share", title=title)
    for cost in costs[:10]:
        floor = cost.nbytes / limits["bandwidth"]
        share = f"{floor / cost.seconds:.2f}" if cost.seconds and floor else ""
        numbers = f"{cost.seconds * 1e6:,.1f}", f"{cost.nbytes / 1e6:,.2f}", f"{floor * 1e6:,.1f}"
        table.add_row(cost.name, str(cost.calls), str(cost.kernels), *numbers, share)
    rest, every = costs[10:], sum(cost.seconds for cost in costs)
    table.add_row(f"{len(rest)} others", "", "", f"{sum(c.seconds for c in rest) * 1e6:,.1f}")
    table.add_row("all", "", str(sum(c.kernels for c in costs)), f"{every * 1e6:,.1f}")
    screen.print(table)


def _top_kernels(model: Model, runner: Runner) -> None:
    """The costliest kernels of a step as the runner really runs it."""

    def run() -> None:
        runner.run({0: model.tokens(1)}, pad_to=1)
        wait(model.be.device)

    run()
    found = by_kernel(trace(run))
    table = Table("kernel", "count", "us", title="the same step by kernel")
    for name, (count, seconds) in sorted(found.items(), key=lambda item: -item[1][1])[:15]:
        table.add_row(name[:90], str(count), f"{seconds * 1e6:,.1f}")
    screen.print(table)


if __name__ == "__main__":
    main()
