"""Decode and prefill speed of a model on each backend, beside transformers, in one run.

    python -m bench.decode [--model demo] [--backends reference,mlx,cuda] [--device auto] [--peer]
                           [--prompt 128] [--tokens 64] [--runs 5] [--out FILE]

Times are the median of the runs, each of which prefills the same tokens and decodes greedily, one
token at a time. Backends take turns, so that a busy machine slows all alike. The floor is the time
in which the bytes of the weights that one token needs would pass at the speed of a copy, measured
in the same run.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

import ds4
from ds4.config import Config
from ds4.loader import find_model
from ds4.proxy import Meter
from ds4.weights import Checkpoint
from ds4.weights.names import expected

Run = Callable[[list[int], int], tuple[float, float]]  # ids, tokens -> seconds of prefill, decode


@dataclass(frozen=True)
class Contender:
    name: str
    device: str
    run: Run
    operations: int | None = None  # calls of the interface for one decoded token


def main() -> None:
    args = _arguments()
    folder = find_model(args.model)
    contenders = [_ours(folder, backend, args.device) for backend in args.backends.split(",")]
    if args.peer:
        contenders.append(_transformers(folder, args.device))
    times = _take_turns(contenders, args.prompt, args.tokens, args.runs)
    floor = _bytes_per_token(folder) / _copy_rate()
    rows = [_row(c, times[c.name], floor, args) for c in contenders]
    _show(rows)
    if args.out:
        with Path(args.out).open("a") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="decode and prefill speed")
    parser.add_argument("--model", default="demo")
    parser.add_argument("--backends", default="reference,mlx,cuda")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--peer", action="store_true", help="transformers as well")
    parser.add_argument("--prompt", type=int, default=128)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--out", help="append a JSON line for each row")
    return parser.parse_args()


def _ours(folder: Path, backend: str, device: str) -> Contender:
    runner = ds4.load(folder, backend, device).runner
    be = runner.be

    def run(ids: list[int], tokens: int) -> tuple[float, float]:
        runner.rewind(0, 0)
        start = time.perf_counter()
        logits = be.download(runner.run({0: ids}))
        middle = time.perf_counter()
        for _ in range(tokens):
            logits = be.download(runner.run({0: [int(logits[-1].argmax())]}))
        return middle - start, time.perf_counter() - middle

    meter: Any = Meter(be)
    runner.be = meter
    runner.run({0: [0]})
    runner.be = be
    return Contender(backend, be.device, run, meter.calls.total())


def _transformers(folder: Path, device: str) -> Contender:
    import torch
    from transformers import DynamicCache

    from tests import oracle

    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    model = oracle.from_checkpoint(folder).to(device)

    @torch.no_grad()
    def run(ids: list[int], tokens: int) -> tuple[float, float]:
        cache = DynamicCache(config=model.config)
        start = time.perf_counter()
        token = torch.tensor([ids], device=device)
        token = model(token, past_key_values=cache, logits_to_keep=1).logits.argmax(-1)
        token.item()
        middle = time.perf_counter()
        for _ in range(tokens):
            token = model(token, past_key_values=cache).logits.argmax(-1)
            token.item()
        return middle - start, time.perf_counter() - middle

    return Contender("transformers", device, run)


def _take_turns(
    contenders: list[Contender], prompt: int, tokens: int, runs: int
) -> dict[str, tuple[float, float]]:
    """Median seconds of prefill and of decode."""
    ids = np.random.default_rng(0).integers(3, 4000, prompt).tolist()
    times: dict[str, list[tuple[float, float]]] = {c.name: [] for c in contenders}
    for contender in contenders:
        contender.run(ids, 2)  # warm up
    for _ in range(runs):
        for contender in contenders:
            times[contender.name].append(contender.run(ids, tokens))
    return {
        name: (statistics.median(t[0] for t in each), statistics.median(t[1] for t in each))
        for name, each in times.items()
    }


def _bytes_per_token(folder: Path) -> int:
    """Stored bytes of all weights but the experts that a token does not use and the embedding."""
    cfg = Config.from_file(folder / "config.json")
    checkpoint, total = Checkpoint(folder), 0
    share = cfg.num_experts_per_tok / cfg.n_routed_experts
    for name, shape in expected(cfg).items():
        if name != "embed.weight" and not name.endswith("tid2eid"):
            nbytes = checkpoint.read(name, shape).nbytes
            total += round(nbytes * share) if ".experts." in name else nbytes
    return total


def _copy_rate() -> float:
    """Bytes a second, read and written, of a large copy by one thread."""
    source = np.ones(1 << 26, np.uint8)
    target = np.empty_like(source)
    best = float("inf")
    for _ in range(5):
        start = time.perf_counter()
        np.copyto(target, source)
        best = min(best, time.perf_counter() - start)
    return 2 * source.nbytes / best


def _row(c: Contender, times: tuple[float, float], floor: float, args: Any) -> dict[str, Any]:
    prefill, decode = times
    return {
        "backend": c.name,
        "model": args.model,
        "device": c.device,
        "prompt": args.prompt,
        "tokens": args.tokens,
        "prefill_tok_s": round(args.prompt / prefill, 1),
        "decode_tok_s": round(args.tokens / decode, 1),
        "decode_ms": round(decode / args.tokens * 1e3, 2),
        "floor_ms": round(floor * 1e3, 3) if c.device == "cpu" else None,
        "operations": c.operations,
        "machine": _machine(c.device),
        "commit": _commit(),
        "date": time.strftime("%Y-%m-%d"),
    }


def _machine(device: str) -> str:
    if device.startswith("cuda"):
        import torch

        return torch.cuda.get_device_name()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{platform.processor() or platform.machine()}, {cores} cores"


def _commit() -> str:
    command = ["git", "describe", "--always", "--dirty"]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()


def _show(rows: list[dict[str, Any]]) -> None:
    columns = ["backend", "prefill_tok_s", "decode_tok_s", "decode_ms", "floor_ms", "operations"]
    table = Table(*columns, title=f"{rows[0]['model']} on {rows[-1]['machine']}")
    for row in rows:
        table.add_row(*("" if row[name] is None else str(row[name]) for name in columns))
    Console().print(table)


if __name__ == "__main__":
    main()
