"""What bounds the kernels of a step: hardware counters of Nsight Compute (ncu).

    python -m bench.counters [--recipe native] [--tokens 1,2048] [--context 512] [--keep FOLDER]

The model has five of the real layers. Kernels of the last two, one of each kind of compression, and
of the head are counted, in a step of one token after `context` others, or a chunk of a prompt. A
kernel is run several times for its counters, alone and with cold caches, so that its time is not
that of bench.speed. Shares are of what the chip could do; stalls are the reasons for which a warp
waits most, in cycles for each instruction that it issues.
"""

import argparse
import csv
import io
import re
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import torch
from rich.table import Table

from ds4 import model as definition
from ds4.loader import Synthetic
from ds4.step import Chunk, plan

from .machine import wait
from .models import open_model
from .report import screen

LAYERS, COUNTED = 5, 2
SECTIONS = "SpeedOfLight", "SchedulerStats", "WarpStateStats", "ComputeWorkloadAnalysis"
TIME = "gpu__time_duration.sum"
SHARES = {
    "memory %": r"dram__throughput.*pct_of_peak_sustained_elapsed",
    "L2 %": r"lts__throughput.*pct_of_peak_sustained_elapsed",
    "L1 %": r"l1tex__throughput.*pct_of_peak_sustained_active",
    "issued %": r"(smsp__issue_active|sm__inst_issued).*(pct_of_peak|per_cycle)",
    "tensor %": r"pipe_tensor.*pct_of_peak_sustained_active",
}
STALL = re.compile(r"issue_stalled_([a-z_0-9]+?)(?:_per_warp_active|_per_issue_active)")


def main() -> None:
    parser = argparse.ArgumentParser(description="hardware counters of a step's kernels")
    parser.add_argument("--recipe", default="native")
    parser.add_argument("--tokens", default="1,2048")
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--keep", type=Path, help="a folder for the counters as ncu prints them")
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    for tokens in map(int, args.tokens.split(",")):
        if args.here:
            run(args.recipe, tokens, args.context)
        else:
            show(f"{args.recipe}, {tokens} tokens", counted(args, tokens))


def run(recipe: str, tokens: int, context: int) -> None:
    """A step of which ncu sees the end."""
    model = open_model(Synthetic("flash", recipe, layers=LAYERS))
    length = 0 if tokens > 1 else context - 1
    runner = model.runner(1, max(tokens, context), max(tokens, 256), length)
    ratios = sorted({ratio for ratio in model.cfg.compress_ratios if ratio})
    step = plan([Chunk(0, length, model.tokens(tokens))], ratios, tokens).on(model.be)

    def watch(layer: int, _: object) -> None:
        if layer == LAYERS - COUNTED - 1:
            wait(model.be.device)
            torch.cuda.profiler.start()

    for seen in (None, None, watch):
        definition.forward(model.be, model.cfg, model.weights, runner.cache, step, seen)
        wait(model.be.device)
    torch.cuda.profiler.stop()


def counted(args: argparse.Namespace, tokens: int) -> list[dict[str, str]]:
    """A row of counters for each kernel, as ncu names them."""
    child = [sys.executable, "-m", "bench.counters", "--here", "--recipe", args.recipe]
    child += ["--tokens", str(tokens), "--context", str(args.context)]
    with tempfile.TemporaryDirectory() as folder:
        kept = (args.keep or Path(folder)) / f"ncu-{args.recipe}-{tokens}.csv"
        kept.parent.mkdir(parents=True, exist_ok=True)
        ncu = ["ncu", "--clock-control", "none", "--profile-from-start", "off", "--csv"]
        ncu += ["--page", "raw", "--print-units", "base", "--log-file", str(kept)]
        ncu += [word for section in SECTIONS for word in ("--section", section)]
        subprocess.run(ncu + child, check=False)
        lines = [line for line in kept.read_text().splitlines() if line.startswith('"')]
    rows = list(csv.DictReader(io.StringIO("\n".join(lines))))
    return rows[1:]  # the first has the units


def show(title: str, rows: list[dict[str, str]]) -> None:
    """Kernels of the same name together, the longest first."""
    alike: defaultdict[str, list[dict[str, str]]] = defaultdict(list)
    for row in rows:
        alike[row["Kernel Name"]].append(row)
    table = Table("kernel", "count", "us", *SHARES, "stalls", title=title)
    for name, some in sorted(alike.items(), key=lambda item: -_sum(item[1], TIME)):
        shares = [_mean(some, pattern) for pattern in SHARES.values()]
        waits = ", ".join(f"{reason} {cycles:.1f}" for reason, cycles in _stalls(some))
        micros = _sum(some, TIME) / len(some) / 1e3  # printed in ns
        table.add_row(name[:36], str(len(some)), f"{micros:.1f}", *shares, waits)
    screen.print(table)


def _sum(rows: list[dict[str, str]], column: str) -> float:
    return sum(map(_number, (row[column] for row in rows)))


def _mean(rows: list[dict[str, str]], pattern: str) -> str:
    column = next((name for name in rows[0] if re.search(pattern, name)), None)
    return "" if column is None else f"{_sum(rows, column) / len(rows):.2f}"


def _stalls(rows: list[dict[str, str]]) -> Iterator[tuple[str, float]]:
    found: dict[str, float] = {}
    for name in rows[0]:
        if (match := STALL.search(name)) and "not_issued" not in name:
            found[match[1]] = _sum(rows, name) / len(rows)
    yield from sorted(found.items(), key=lambda item: -item[1])[:3]


def _number(text: str) -> float:
    try:
        return float(text.replace(",", ""))
    except ValueError:
        return float("nan")


if __name__ == "__main__":
    main()
