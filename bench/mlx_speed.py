"""The MLX backend beside itself as it was and beside mlx-lm's layers put together naively.

    git archive 3613a0f | tar -x -C /tmp/before && cp -r /tmp/before/backends /tmp/before/ds4/
    pip install --no-deps mlx-lm
    python -m bench.mlx_speed [--before /tmp/before] [--model demo|middle|flash] [--device cpu|gpu]
                              [--prompt 128] [--tokens 64] [--runs 5] [--out FILE]

Contenders are processes that take turns, so that a busy machine slows all alike; ratios are medians
of the ratios of one turn. Primitives are those of the graph of one decoded token; views do no work.
Cache mode exact, as mlx-lm's layers have no other. Greedy tokens must be the same, but for random
models of "before", whose weights an older version draws otherwise. "middle" has
hidden 1,024, 12 layers and 64 experts; "flash" has the 43 layers of the real model at small widths,
and is counted with its Metal kernels too, each as the one primitive that it is on a Mac.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from bench.mlx_worker import VIEWS

ROOT = Path(__file__).parent.parent
LAYERS = {"demo": 6, "middle": 12, "flash": 43}


class Worker:
    def __init__(self, name: str, kind: str, model: str, tree: Path, device: str) -> None:
        self.name = name
        command = [sys.executable, str(ROOT / "bench/mlx_worker.py"), kind, model, "exact", device]
        paths = os.pathsep.join([str(tree), str(ROOT)])
        env = os.environ | {"PYTHONPATH": paths}
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, env=env)

    def ask(self, **task: Any) -> dict[str, Any]:
        assert self.process.stdin
        assert self.process.stdout
        print(json.dumps(task), file=self.process.stdin, flush=True)
        answer: dict[str, Any] = json.loads(self.process.stdout.readline())
        return answer


def main() -> None:
    args = _arguments()
    workers = [Worker("now", "ours", args.model, ROOT, args.device)]
    if args.before:
        workers.append(Worker("before", "ours", args.model, args.before, args.device))
    workers.append(Worker("naive mlx-lm", "naive", args.model, ROOT, args.device))
    prompt = np.random.default_rng(0).integers(3, 4000, args.prompt).tolist()
    counts = {w.name: w.ask(do="count", prompt=prompt) for w in workers}
    if args.model == "flash":
        counter = Worker("now, with kernels", "ours", "flash, kernels", ROOT, "cpu")
        counts[counter.name] = counter.ask(do="count", prompt=prompt)
    times: list[dict[str, dict[str, Any]]] = []
    for turn in range(args.runs + 1):
        found = {w.name: w.ask(do="run", prompt=prompt, tokens=args.tokens) for w in workers}
        if turn:  # the first warms up
            times.append(found)
        same = [one for name, one in found.items() if args.model == "demo" or name != "before"]
        if len({tuple(one["chosen"]) for one in same}) > 1:
            sys.exit("the contenders chose different tokens")
    rows = [_row(name, names, times, args) for name, names in counts.items()]
    _show(rows, args)
    if args.out:
        with Path(args.out).open("a") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="the MLX backend's speed")
    parser.add_argument("--before", type=Path)
    parser.add_argument("--model", default="demo", choices=("demo", "middle", "flash"))
    parser.add_argument("--device", default="cpu", choices=("cpu", "gpu"))
    parser.add_argument("--prompt", type=int, default=128)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--out", help="append a JSON line for each row")
    return parser.parse_args()


def _row(name: str, names: dict[str, int], times: list[Any], args: Any) -> dict[str, Any]:
    views = sum(count for primitive, count in names.items() if primitive in VIEWS)
    work = sum(names.values()) - views
    row = {
        "contender": name,
        "model": args.model,
        "device": args.device,
        "primitives": work,
        "a_layer": round(work / LAYERS[args.model], 1),
        "views": views,
        "machine": f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores",
        "date": time.strftime("%Y-%m-%d"),
    }
    if name not in times[0]:
        return row
    for phase, count in (("prefill", args.prompt), ("decode", args.tokens)):
        seconds = [turn[name][phase] for turn in times]
        row[f"{phase}_tok_s"] = round(count / statistics.median(seconds), 1)
        ratios = [turn[name][phase] / turn["now"][phase] for turn in times]
        row[f"{phase}_now_is"] = round(statistics.median(ratios), 2)
        cpu = [turn[name][f"{phase}_cpu"] / turn["now"][f"{phase}_cpu"] for turn in times]
        row[f"{phase}_now_is_cpu"] = round(statistics.median(cpu), 2)
    return row


def _show(rows: list[dict[str, Any]], args: Any) -> None:
    title = f"{args.model} on {rows[0]['machine']}; now_is: how many times as fast it is now"
    columns = list(rows[0])
    shown = [c for c in columns if c not in ("model", "device", "machine", "date")]
    table = Table(*shown, title=title)
    for row in rows:
        table.add_row(*(str(row.get(name, "")) for name in shown))
    Console(width=180).print(table)


if __name__ == "__main__":
    main()
