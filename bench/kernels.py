"""Checks and times kernels, each against a reference and beside the floor.

    python -m bench.kernels [WORD ...] [--device cuda] [--out bench/results/kernels.jsonl]

A kernel's cases are registered by a generator in a bench/kernels_*.py file:

    @cases
    def linears() -> Iterator[Case]:
        yield Case("linear mxfp4 4096 x 1024", make=..., run=..., reference=..., nbytes=...)

A case is checked on inputs of its own: the norm of the difference over that of the reference, and
NaN never passes. On a GPU it is timed in a CUDA graph, over so many sets of inputs that the L2
cache keeps none. Exit status 1 if a kernel is wrong.
"""

import argparse
import importlib
import json
import statistics
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from .machine import Clock, ceilings, describe

CACHE_BYTES = 120e6  # more than any L2 in use
MOST_SETS = 24
screen = Console(width=150)


@dataclass(frozen=True)
class Case:
    """One kernel at one shape."""

    name: str
    make: Callable[[str, int], Any]  # device, number of the set -> inputs, different each time
    run: Callable[[Any], Any]
    reference: Callable[[Any], Tensor]  # in a higher precision
    nbytes: float  # that must be read and written
    tolerance: float = 1e-3
    operations: float = 0.0  # floating-point, where they may be the floor
    result: Callable[[Any], Tensor] = lambda out: out  # what `run` made, for the reference


@dataclass(frozen=True)
class Result:
    case: Case
    error: float
    seconds: float

    @property
    def right(self) -> bool:
        return self.error <= self.case.tolerance  # false for NaN


_REGISTRY: dict[str, Callable[[], Iterator[Case]]] = {}


def cases(generator: Callable[[], Iterator[Case]]) -> Callable[[], Iterator[Case]]:
    """Register the cases of one kernel under the generator's name."""
    _REGISTRY[generator.__name__] = generator
    return generator


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="kernels: right, and how fast")
    parser.add_argument("words", nargs="*", help="only cases whose name has one of these")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--out", help="append a JSON line for each case")
    args = parser.parse_args(arguments)
    for file in sorted(Path(__file__).parent.glob("kernels_*.py")):
        importlib.import_module(f"bench.{file.stem}")
    limits = ceilings(args.device)
    results = [measure(case, args.device) for case in chosen(args.words)]
    _show(results, limits)
    if args.out:
        facts = describe(args.device)
        with Path(args.out).open("a") as out:
            out.writelines(json.dumps(facts | _row(r, limits)) + "\n" for r in results)
    if not all(result.right for result in results):
        sys.exit(1)


def chosen(words: list[str]) -> Iterator[Case]:
    """Every registered case, or those with one of the words in their name."""
    for name, generator in _REGISTRY.items():
        for case in generator():
            if not words or any(word in f"{name} {case.name}" for word in words):
                yield case


def measure(case: Case, device: str) -> Result:
    """Check a case, then time it."""
    inputs = case.make(device, 0)
    error = difference(case.result(case.run(inputs)), case.reference(inputs))
    count = max(2, min(MOST_SETS, round(CACHE_BYTES / max(case.nbytes, 1))))
    sets = [inputs, *(case.make(device, i) for i in range(1, count))]
    return Result(case, error, timed(device, [partial(case.run, one) for one in sets]))


def difference(got: Tensor, want: Tensor) -> float:
    """The norm of the difference, relative; infinite if a value is missing."""
    got, want = got.double(), want.double()
    if got.shape != want.shape or not got.isfinite().all():
        return float("inf")
    return float((got - want).norm() / want.norm().clamp_min(1e-300))


def timed(device: str, calls: list[Callable[[], object]], runs: int = 20) -> float:
    """Median seconds of a call, when all run one after the other."""
    replay = _captured(calls) if device.startswith("cuda") else lambda: [call() for call in calls]
    for _ in range(3):
        replay()
    clock = Clock(device)
    clock.mark()
    for _ in range(runs):
        replay()
        clock.mark()
    return statistics.median(clock.intervals()) / len(calls)


def _captured(calls: list[Callable[[], object]]) -> Callable[[], object]:
    """All calls as one CUDA graph: what launching costs is in no figure."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):  # compile, and allocate what is kept
        for call in calls:
            call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    return graph.replay


def _floor(case: Case, limits: dict[str, float]) -> float:
    return max(case.nbytes / limits["bandwidth"], case.operations / limits["operations"])


def _row(result: Result, limits: dict[str, float]) -> dict[str, Any]:
    case, seconds = result.case, result.seconds
    return {
        "bench": "kernels",
        "case": case.name,
        "error": result.error,
        "right": result.right,
        "us": round(seconds * 1e6, 2),
        "mb": round(case.nbytes / 1e6, 3),
        "gb_s": round(case.nbytes / seconds / 1e9),
        "floor_us": round(_floor(case, limits) * 1e6, 2),
        "share": round(_floor(case, limits) / seconds, 3),
    }


def _show(results: list[Result], limits: dict[str, float]) -> None:
    names = "case", "error", "us", "mb", "gb_s", "floor_us", "share", ""
    table = Table(*names, title=f"{limits['bandwidth'] / 1e9:,.0f} GB/s")
    for result in results:
        row = _row(result, limits)
        row["error"], row[""] = f"{result.error:.1e}", "" if result.right else "WRONG"
        table.add_row(*(str(row["case" if name == "case" else name]) for name in names))
    screen.print(table)


if __name__ == "__main__":
    importlib.import_module("bench.kernels").main()  # cases register there, not in __main__
