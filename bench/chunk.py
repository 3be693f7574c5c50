"""Where the time of one chunk of a prompt goes: launching on the host, working on the GPU.

    python -m bench.chunk [--synthetic flash] [--recipe native] [--unique-layers 7]
        [--tokens 64,128,256,512,1024,2048] [--profile 512] [--device auto]
        [--out bench/results/chunk.jsonl]

For each size: the time until the host has launched everything, the time until the GPU has done it,
what the GPU's kernels take in sum and how many there are, and the same step replayed from a graph.
Of one size also the host's functions and the GPU's kernels that take longest. First, prompts in
two chunks as a user gets them, from graphs once their shapes repeat, are compared with the same
steps run as they are written: logits must be equal to the bit.
"""

import argparse
import cProfile
import json
import pstats
import statistics
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

from ds4 import model as definition
from ds4.loader import Synthetic
from ds4.runner import Runner
from ds4.step import Chunk, Step, plan

from .machine import describe, wait
from .models import Model, free, open_model
from .operations import by_kernel, trace

RUNS = 5


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="host and GPU time of a chunk of a prompt")
    parser.add_argument("--synthetic", default="flash")
    parser.add_argument("--recipe", default="native")
    parser.add_argument("--unique-layers", type=int, default=7, help="0: all; tiny has fewer")
    parser.add_argument("--tokens", default="64,128,256,512,1024,2048")
    parser.add_argument("--profile", type=int, default=512, help="0: none")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--out", help="append a JSON line for each size")
    args = parser.parse_args(arguments)
    synthetic = Synthetic(args.synthetic, args.recipe, args.unique_layers or None)
    model = open_model(synthetic, "cuda", args.device)
    common = {"bench": "chunk", "model": args.synthetic, "recipe": args.recipe}
    facts = describe(model.be.device)
    check(model)
    if args.profile:
        profile(model, args.profile)
    for tokens in map(int, args.tokens.split(",")):
        row = measure(model, tokens)
        print(" ".join(f"{name} {value}" for name, value in row.items()), flush=True)
        if args.out:
            with Path(args.out).open("a") as out:
                out.write(json.dumps(common | row | facts) + "\n")
        free(model.be.device)


def check(model: Model, rounds: int = 4) -> None:
    from ds4.backends.cuda.graph import padded

    runner, other = (model.runner(2, 1024, 256) for _ in range(2))
    ratios = sorted({ratio for ratio in model.cfg.compress_ratios if ratio})
    alike, off = [], 0.0
    for i in range(rounds):
        runner.rewind(i % 2, 0)
        for tokens in (195 + 9 * i, 130 + 13 * i):
            ids = model.tokens(tokens)
            step = padded(plan([Chunk(i % 2, runner.lengths[i % 2], ids)], ratios))
            got = runner.run({i % 2: ids}).clone()
            want = definition.forward(
                model.be, model.cfg, model.weights, other.cache, step.on(model.be)
            )
            alike.append(torch.equal(got, want[:1]))
            off = max(off, ((got - want[:1]).norm() / want[:1].norm()).item())
    recorded = getattr(runner._forward, "recorded", 0)
    print(
        f"{sum(alike)} of {len(alike)} chunks equal, the others off by at most {off:.1e};"
        f" {recorded} graphs",
        flush=True,
    )


class Eager:
    """A chunk from an empty cache, run as it is written."""

    def __init__(self, model: Model, tokens: int) -> None:
        self.model = model
        self.runner: Runner = model.runner(1, tokens, tokens)
        ratios = sorted({ratio for ratio in model.cfg.compress_ratios if ratio})
        self.step: Step = plan([Chunk(0, 0, model.tokens(tokens))], ratios)

    def __call__(self) -> Any:
        m = self.model
        on_device = self.step.on(m.be)
        return definition.forward(m.be, m.cfg, m.weights, self.runner.cache, on_device)


def measure(model: Model, tokens: int) -> dict[str, Any]:
    run, device = Eager(model, tokens), model.be.device

    def waited() -> None:
        run()
        wait(device)

    row: dict[str, Any] = {"tokens": tokens} | started(run, device)
    launched, done = [], []
    for _ in range(RUNS):
        start = time.perf_counter()
        run()
        launched.append(time.perf_counter() - start)
        wait(device)
        done.append(time.perf_counter() - start)
    row["launched_ms"] = ms(statistics.median(launched))
    row["done_ms"], row["fastest_ms"] = ms(statistics.median(done)), ms(min(done))
    if device.startswith("cuda"):
        found = by_kernel(trace(waited))
        row["kernels"] = sum(count for count, _ in found.values())
        row["kernels_ms"] = ms(sum(seconds for _, seconds in found.values()))
        row |= replayed(run, device)
    return row


def started(run: Eager, device: str) -> dict[str, Any]:
    """The first runs: compiling everything at once, what that left, and a second time."""
    row = {}
    for name in "compile_ms", "first_ms", "second_ms":
        start = time.perf_counter()
        with ExitStack() as stack:
            if name == "compile_ms" and device.startswith("cuda"):
                from ds4.backends.cuda.ahead import compile_only

                stack.enter_context(compile_only())
            run()
        wait(device)
        row[name] = ms(time.perf_counter() - start)
    return row


def replayed(run: Eager, device: str) -> dict[str, Any]:
    """The step from a graph: how long that takes to make, and to run."""
    on_device, graph = run.step.on(run.model.be), torch.cuda.CUDAGraph()
    m = run.model
    wait(device)
    before = torch.cuda.memory_reserved()
    start = time.perf_counter()
    try:
        with torch.cuda.graph(graph):
            definition.forward(m.be, m.cfg, m.weights, run.runner.cache, on_device)
    except RuntimeError as error:
        return {"graph": str(error)[:300]}
    made, taken = time.perf_counter() - start, []
    for _ in range(RUNS):
        start = time.perf_counter()
        graph.replay()
        wait(device)
        taken.append(time.perf_counter() - start)
    return {
        "capture_ms": ms(made),
        "first_replay_ms": ms(taken[0]),
        "replay_ms": ms(statistics.median(taken)),
        "graph_mb": round((torch.cuda.memory_reserved() - before) / 1e6),
    }


def profile(model: Model, tokens: int) -> None:
    """The longest functions of the host, and kernels of the GPU."""
    run, device = Eager(model, tokens), model.be.device

    def waited() -> None:
        run()
        wait(device)

    print(started(run, device), flush=True)
    with cProfile.Profile() as seen:
        run()
    pstats.Stats(seen).sort_stats("tottime").print_stats(45)
    pstats.Stats(seen).sort_stats("cumtime").print_stats(40)
    wait(device)
    if device.startswith("cuda"):
        found = by_kernel(trace(waited))
        for name, (count, seconds) in sorted(found.items(), key=lambda item: -item[1][1])[:24]:
            print(
                f"{ms(seconds):8.3f} ms {count:5} x {seconds / count * 1e6:8.1f} us  {name[:110]}"
            )


def ms(seconds: float) -> float:
    return round(seconds * 1e3, 3)


if __name__ == "__main__":
    main()
