"""Experts and heads split over the GPUs of this host, against one GPU, in one run (issue 11).

    python -m bench.two_gpus [--gpus 2] [--parts one,equal,heads,killed,whole,slow,shared]
        [--model flash] [--device auto] [--backend cuda] [--seconds 185] [--out out/two_gpus.jsonl]

one     one GPU: decoding, a prompt, energy; another computes results to compare with
equal   several GPUs: logits and greedy tokens like those results, made beside it if not by `one`
heads   several GPUs: as `one`, and the sums, with attention shared out by heads
killed  a rank is killed in the middle of a text (two_gpus_killed.py)
whole   as `heads`, attention computed by every rank
slow    as `heads`, without peer-to-peer and energy
shared  as `equal`, for ranks on one GPU

Each part has processes of its own, and one that fails or hangs takes no other with it; rows are
written as they come, and a part that no time is left for is named. On a CPU: --gpus 2 --model demo
--device cpu.
"""

import argparse
import faulthandler
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ds4.parallel.launch import join

from . import two_gpus_checks as checks
from .two_gpus_speed import speed

PARTS = "one,equal,heads,killed,whole,slow,shared"
MOST_S = 90.0  # of a part
LEAST_S = 20.0  # a part does not begin with less
SHOWING_S = 8.0  # before the end a part shows where it hangs; other ranks begin later
SAVED = Path(tempfile.gettempdir(), "ds4-two-gpus.npz")  # large: every logit
ENVIRONMENT = {"NCCL_NVLS_ENABLE": "0", "NCCL_DEBUG": "WARN"}  # no NVLink multicast


def main() -> None:
    args = _arguments()
    if args.part:
        faulthandler.dump_traceback_later(args.seconds)  # every rank: where does it hang?
        _part(args)
        faulthandler.cancel_dump_traceback_later()
        return
    Path(args.out).parent.mkdir(parents=True, exist_ok=True)
    SAVED.unlink(missing_ok=True)
    os.environ.update(ENVIRONMENT)
    end = time.perf_counter() + args.seconds
    for part in args.parts.split(","):
        start = time.perf_counter()
        if (left := end - start) < LEAST_S:
            print(f"== {part}: left out, no time is left", flush=True)
            continue
        print(f"== {part}", flush=True)
        _run(args, part, min(left, MOST_S))
        print(f"   {time.perf_counter() - start:.0f} s", flush=True)


def _run(args: argparse.Namespace, part: str, seconds: float) -> None:
    """A part in processes of its own; they show where they are when their time is up."""
    processes = []
    alone = ["results"] if part == ("one" if "one" in args.parts else "equal") else []
    for name in [*alone, part]:
        gpus = 1 if name in ("results", "one") else args.gpus
        places = {"results": "cuda:1", "shared": "cuda:0"} if args.device == "auto" else {}
        module = ["bench.two_gpus", "--part", name]
        module = ["bench.two_gpus_killed"] if name == "killed" else module
        command = [sys.executable, "-m", *module, "--gpus", str(gpus)]
        command += ["--model", args.model, "--device", places.get(name, args.device)]
        command += ["--out", args.out, "--seconds", str(seconds - SHOWING_S)]
        command += [] if name == "killed" else ["--backend", args.backend]
        env = os.environ | ({"NCCL_P2P_DISABLE": "1"} if part == "slow" else {})
        processes.append((name, subprocess.Popen(command, env=env)))
    for name, process in processes:
        try:
            status = process.wait(seconds)
        except subprocess.TimeoutExpired:
            process.kill()  # its ranks end with it
            status = process.wait()
        if status:
            print(f"   {name} ended with status {status}", flush=True)


def _part(args: argparse.Namespace) -> None:
    """One part in this process and those that it starts: all do the same, or end together."""
    crew = join(args.gpus, [sys.executable, *sys.orig_argv[1:]]) if args.gpus > 1 else None
    torch.set_grad_enabled(False)
    rank = 0 if crew is None else crew.rank
    if rank:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115  # for the whole process
    if args.part == "results":
        results = checks.computed(args.model, args.backend, args.device)
        np.savez(SAVED.with_suffix(".part.npz"), allow_pickle=False, **results)
        SAVED.with_suffix(".part.npz").rename(SAVED)
        return
    if args.part in ("equal", "shared"):
        results = checks.computed(args.model, args.backend, args.device)
        while not SAVED.exists():  # it may be in the making
            time.sleep(0.1)
        _keep(args, rank, checks.compared(results, np.load(SAVED)))
        return
    for row in speed(args.model, args.device, args.part):
        _keep(args, rank, row)


def _keep(args: argparse.Namespace, rank: int, row: dict[str, Any]) -> None:
    shown = {k: v for k, v in row.items() if k not in ("device", "driver", "torch", "triton")}
    print("  ", ", ".join(f"{k} {v}" for k, v in shown.items()), flush=True)
    if not rank:
        common = {"bench": "two_gpus", "part": args.part, "gpus": args.gpus}
        common |= {"backend": args.backend}
        with open(args.out, "a") as out:
            out.write(json.dumps(common | row) + "\n")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="several GPUs against one")
    parser.add_argument("--gpus", type=int, default=2)
    parser.add_argument("--parts", default=PARTS)
    parser.add_argument("--part", help="only this one, here")
    parser.add_argument("--model", default="flash", help="flash, or demo to try the script")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--backend", choices=("cuda", "torch"), help="torch: float32 throughout")
    parser.add_argument("--seconds", type=float, default=185, help="in all, about")
    parser.add_argument("--out", default="out/two_gpus.jsonl")
    args = parser.parse_args()
    args.backend = args.backend or ("torch" if args.device == "cpu" else "cuda")
    return args


if __name__ == "__main__":
    main()
