"""A very long prompt, run in chunks to its end, and decoding after it.

    python -m bench.million [--tokens 1048576] [--chunk 8192] [--layers 7] [--recipe native]
        [--unique-layers 7] [--backend cuda] [--device auto] [--out bench/results/million.jsonl]

With fewer layers than the model has (the first ones; 7 are of every kind) a run takes minutes less.
Prints the speed at once as the prompt grows, then the memory beside what ds4.plan predicts, and the
speed of decoding at the end; the last logits must be finite.
"""

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from ds4.loader import Synthetic
from ds4.plan.memory import predict
from ds4.runner import Runner

from . import memory
from .floors import prefill_operations, step_bytes
from .machine import Clock, ceilings, describe, wait
from .models import Model, open_model

DECODED = 12  # tokens after the prompt, of which the first few warm up
screen = Console(width=150)


def main(arguments: list[str] | None = None) -> None:
    args = _arguments(arguments)
    synthetic = Synthetic("flash", args.recipe, args.unique_layers, layers=args.layers)
    if args.synthetic != "flash":
        synthetic = Synthetic(args.synthetic, args.recipe, layers=args.layers)
    before = memory.used(args.device)
    model = open_model(synthetic, args.backend, args.device)
    limits = ceilings(model.be.device)
    runner = model.runner(1, args.tokens, min(args.chunk, args.tokens))
    held = memory.used(model.be.device) - before
    memory.reset_peak(model.be.device)
    row = {
        "bench": "million",
        "model": synthetic.model,
        "recipe": synthetic.recipe,
        "layers": model.cfg.num_hidden_layers,
        "tokens": args.tokens,
        "chunk": runner.max_chunk,
        **prefill(model, runner, args.tokens, limits),
        **decode(model, runner, limits),
        **memories(model, runner, held, before),
        **describe(model.be.device),
    }
    screen.print(row)
    if args.out:
        with Path(args.out).open("a") as file:
            file.write(json.dumps(row) + "\n")


def _arguments(given: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="a million tokens of context")
    parser.add_argument("--synthetic", default="flash", help="flash, tiny, demo or a folder")
    parser.add_argument("--tokens", type=int, default=1 << 20)
    parser.add_argument("--chunk", type=int, default=8192)
    parser.add_argument("--layers", type=int, default=None)
    parser.add_argument("--recipe", default="native")
    parser.add_argument("--unique-layers", type=int, default=7)
    parser.add_argument("--backend", default="cuda")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--out", help="append a JSON line")
    return parser.parse_args(given)


def prefill(model: Model, runner: Runner, tokens: int, limits: dict[str, float]) -> dict[str, Any]:
    """All but the tokens that decoding is left with."""
    tokens -= DECODED
    start = since = time.perf_counter()
    done = shown = 0
    logits: Any = None
    while done < tokens:
        ids = model.tokens(min(runner.max_chunk, tokens - done))
        logits = runner.run({0: ids})
        done += len(ids)
        if done >= max(2 * shown, tokens // 64) or done == tokens:
            wait(model.be.device)
            now = time.perf_counter()
            speed = (done - shown) / (now - since)
            screen.print(f"{done:,} tokens, {now - start:,.1f} s; the last ones {speed:,.0f} tok/s")
            since, shown = now, done
    seconds = time.perf_counter() - start
    assert np.isfinite(model.be.download(logits)).all(), "logits are not finite"
    floor = prefill_operations(model, tokens) / limits["operations"]
    return {
        "prefill_s": round(seconds, 2),
        "prefill_tok_s": round(tokens / seconds, 1),
        "prefill_floor_s": round(floor, 2),
    }


def decode(model: Model, runner: Runner, limits: dict[str, float]) -> dict[str, Any]:
    """The median step at the end of the context."""
    clock = Clock(model.be.device)
    for _ in range(DECODED - 1):
        runner.run({0: model.tokens(1)}, pad_to=1)
        clock.mark()
    seconds = statistics.median(clock.intervals()[3:])
    experts = model.cfg.num_experts_per_tok
    floor = step_bytes(model, 1, 1, runner.context, experts) / limits["bandwidth"]
    return {
        "decode_ms": round(seconds * 1e3, 3),
        "decode_tok_s": round(1 / seconds, 1),
        "decode_floor_ms": round(floor * 1e3, 3),
    }


def memories(model: Model, runner: Runner, held: int, before: int) -> dict[str, Any]:
    """Bytes predicted and held by weights and caches, and the most that a step needed beside."""
    recipe, unique = model.source.recipe, len(set(model.source.same_as.values()))
    assert recipe is not None
    want = predict(model.cfg, recipe, runner.context, 1, runner.max_chunk, unique)
    return {
        "predicted_held_bytes": want.held,
        "held_bytes": held,
        "predicted_cache_bytes": want.cache,
        "predicted_working_bytes": want.working,
        "working_bytes": max(0, memory.peak(model.be.device) - before - held),
    }


if __name__ == "__main__":
    main()
