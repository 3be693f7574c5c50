"""Time from a command to its first token, and what it is made of.

    python -m bench.startup [--model demo | --synthetic flash [--unique-layers 7] [--recipe native]]
        [--backend cuda] [--device auto] [--cold] [--runs 2] [--out bench/results/startup.jsonl]

Each run is a new process that does what `ds4 generate` does. A step of a new shape compiles its
kernels, or reads compiled ones; the second time a GPU records it, the third time it is replayed, so
that the differences are what compiling and recording take. With --cold the first run finds no
compiled kernels (its caches are empty folders); later runs find those of the first.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from ds4.errors import Ds4Error

PROMPT = list(range(10, 26))
ROUNDS = "first", "second", "third"


def main(arguments: list[str] | None = None) -> None:
    args = _arguments(arguments)
    if args.started is not None:
        try:
            print(json.dumps(_child(args)))
        except Ds4Error as error:
            sys.exit(f"error: {error}")
        return
    with tempfile.TemporaryDirectory() as folder:
        caches = {"TRITON_CACHE_DIR": f"{folder}/triton", "XDG_CACHE_HOME": folder}
        environment = os.environ | (caches if args.cold else {})
        rows = [_run(args, environment, i) for i in range(args.runs)]
    _show(rows)
    if args.out:
        with Path(args.out).open("a") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)


def _arguments(given: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="time to the first token")
    parser.add_argument("--model", default="demo")
    parser.add_argument("--synthetic", help="flash, tiny, demo or a folder: random weights")
    parser.add_argument("--recipe", default="native")
    parser.add_argument("--unique-layers", type=int, default=7, help="0: all; tiny has fewer")
    parser.add_argument("--backend", default="cuda")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--cold", action="store_true", help="begin without compiled kernels")
    parser.add_argument("--runs", type=int, default=2)
    parser.add_argument("--started", type=float, help=argparse.SUPPRESS)
    parser.add_argument("--out", help="append a JSON line for each run")
    return parser.parse_args(given)


def _run(args: argparse.Namespace, environment: dict[str, str], number: int) -> dict[str, Any]:
    options = [sys.executable, "-m", "bench.startup", "--started", repr(time.time())]
    options += ["--model", args.model, "--recipe", args.recipe]
    options += ["--backend", args.backend, "--device", args.device]
    if args.synthetic:
        options += ["--synthetic", args.synthetic]
    options += ["--unique-layers", str(args.unique_layers)]
    done = subprocess.run(options, env=environment, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        sys.exit(done.returncode)  # it has said why
    row: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    compiled = "cold" if args.cold and number == 0 else "warm"
    return {"bench": "startup", "run": number, "kernels": compiled, **row}


def _child(args: argparse.Namespace) -> dict[str, Any]:
    """One start, in this process: seconds of each part."""
    parts: dict[str, float] = {}
    last = args.started

    def done(part: str) -> None:
        nonlocal last
        now = time.time()
        parts[part], last = now - last, now

    done("python")
    import numpy as np

    if args.backend == "cuda":
        import torch
    done("import torch" if args.backend == "cuda" else "import numpy")
    from ds4.backend import open_backend
    from ds4.loader import Synthetic, load, load_synthetic

    open_backend(args.backend, args.device)  # a GPU's context
    done("open the device")
    if args.synthetic:
        model = Synthetic(args.synthetic, args.recipe, args.unique_layers or None)
        llm = load_synthetic(model, args.backend, args.device)
    else:
        llm = load(args.model, args.backend, args.device)
    be = llm.runner.be
    if be.device.startswith("cuda"):
        torch.cuda.synchronize()
    done("load weights")
    to_first = sum(parts.values())
    for when in ROUNDS:
        llm.runner.rewind(0, 0)
        logits = be.download(llm.runner.run({0: PROMPT}))
        done(f"prompt, {when}")
        be.download(llm.runner.run({0: [int(np.argmax(logits[-1]))]}, pad_to=1))
        done(f"token, {when}")
    to_first += parts[f"prompt, {ROUNDS[0]}"]
    from .machine import describe

    return {
        "model": args.synthetic or args.model,
        "first_token_s": round(to_first, 3),
        "parts": {part: round(seconds, 3) for part, seconds in parts.items()},
        **describe(be.device),
    }


def _show(rows: list[dict[str, Any]]) -> None:
    from rich.console import Console
    from rich.table import Table

    heads = [f"{row['kernels']} {row['run']}" for row in rows]
    table = Table("seconds", *heads, title=f"{rows[0]['model']} on {rows[0]['device']}")
    for part in rows[0]["parts"]:
        table.add_row(part, *(f"{row['parts'][part]:.3f}" for row in rows))
    table.add_row("to the first token", *(f"{row['first_token_s']:.3f}" for row in rows))
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
