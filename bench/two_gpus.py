"""Experts and heads split over the GPUs of this host, against one GPU, in one run (issue 11).

    python -m bench.two_gpus [--gpus 2] [--parts one,several,killed,slow,shared] [--model flash]
        [--device auto] [--out out/two_gpus.jsonl]

`one` and `several` compare logits and greedy tokens, and measure decoding, a prompt, the sums and
the energy; several GPUs with attention by heads and computed by every rank. `killed` kills a rank
in the middle of a text; `slow` measures without peer-to-peer; `shared` compares results of ranks on
one GPU. Each part has processes of its own; rows are written as they come. On a CPU: --gpus 2
--model demo --device cpu.
"""

import argparse
import json
import os
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ds4.parallel.launch import join

from . import two_gpus_checks as checks
from .two_gpus_speed import speed

HERE = "bench.two_gpus"


def main() -> None:
    args = _arguments()
    if args.part:
        _part(args)
        return
    out = Path(args.out)
    out.parent.mkdir(parents=True, exist_ok=True)
    no_p2p = {"NCCL_P2P_DISABLE": "1"}
    plan = [("one", 1, {}), ("several", args.gpus, {}), ("killed", 0, {})]
    plan += [("slow", args.gpus, no_p2p), ("shared", args.gpus, {})]
    for part, gpus, env in plan:
        if part not in args.parts.split(","):
            continue
        start = time.perf_counter()
        print(f"== {part}, {gpus or args.gpus} GPUs {env or ''}", flush=True)
        if part == "killed":
            _tried(lambda: checks.killed(args.model, args.gpus, args.device, out))
        else:
            _run(args, part, gpus, env)
        print(f"   {time.perf_counter() - start:.0f} s", flush=True)


def _run(args: argparse.Namespace, part: str, gpus: int, env: dict[str, str]) -> None:
    """On one GPU the results to compare with are computed on another while speed is measured."""
    parts = ["results", "one"] if part == "one" else [part]
    processes = []
    for name in parts:
        places = {"results": "cuda:1", "shared": "cuda:0"} if args.device == "auto" else {}
        device = places.get(name, args.device)
        command = [sys.executable, "-m", HERE, "--part", name, "--gpus", str(gpus)]
        command += ["--model", args.model, "--device", device, "--out", args.out]
        processes.append(subprocess.Popen(command, env=os.environ | env))
    for process in processes:
        try:
            process.wait(90)
        except subprocess.TimeoutExpired:
            process.kill()  # its ranks end with it
            print("   took more than 90 s")


def _part(args: argparse.Namespace) -> None:
    """One part in this process and those that it starts: all do the same."""
    crew = join(args.gpus, [sys.executable, *sys.orig_argv[1:]]) if args.gpus > 1 else None
    torch.set_grad_enabled(False)
    rank = 0 if crew is None else crew.rank
    if rank:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115  # for the whole process
    saved = Path(args.out).with_name("one_gpu.npz")

    def equality() -> None:
        got = checks.computed(args.model, args.device)
        if crew is None:
            np.savez(saved, **got)
        else:
            _keep(
                args.out,
                rank,
                checks.compared(got, np.load(saved)) | {"ranks": args.gpus, "device": args.device},
            )

    def measured(by_heads: bool) -> None:
        for row in speed(args.model, args.device, by_heads):
            row |= {"gpus": args.gpus, "attention": "heads" if by_heads and crew else "whole"}
            _keep(args.out, rank, row | {"p2p": "NCCL_P2P_DISABLE" not in os.environ})

    if args.part in ("results", "several", "shared"):
        _tried(equality)
    if args.part in ("results", "shared"):
        return
    for by_heads in (True, False) if args.part == "several" else (True,):
        _tried(lambda by_heads=by_heads: measured(by_heads))


def _tried(work: Callable[[], None]) -> None:
    """What fails is shown, and the rest goes on: this machine will not come again soon."""
    try:
        work()
    except Exception:
        traceback.print_exc()


def _keep(file: str, rank: int, row: dict[str, Any]) -> None:
    shown = {k: v for k, v in row.items() if k not in ("device", "driver", "torch", "triton")}
    print("  ", ", ".join(f"{k} {v}" for k, v in shown.items()), flush=True)
    if not rank:
        with open(file, "a") as out:
            out.write(json.dumps({"bench": "two_gpus"} | row) + "\n")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="several GPUs against one")
    parser.add_argument("--gpus", type=int, default=2)
    parser.add_argument("--parts", default="one,several,killed,slow,shared")
    parser.add_argument("--part", help="only this one, here")
    parser.add_argument("--model", default="flash", help="flash, or demo to try the script")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--out", default="out/two_gpus.jsonl")
    return parser.parse_args()


if __name__ == "__main__":
    main()
