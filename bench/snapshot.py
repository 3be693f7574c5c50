"""A long prefix put back from memory and from disk, beside computing it again.

    python -m bench.snapshot [--tokens 100000] [--synthetic flash] [--backend cuda] [--device auto]
        [--folder DIR] [--sampled] [--out bench/results/snapshot.jsonl]

First it checks that a restored sequence goes on bit for bit like the one it was taken from. "Cold"
means that the files were dropped from the system's memory before they were read. With --sampled the
prefix is never run: its rows are those of a short run, mixed, and the prefill is estimated from
three of its chunks.
"""

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from ds4.engine import snapshot
from ds4.engine.prefix import PrefixCache
from ds4.loader import Synthetic
from ds4.runner import Runner

from .machine import describe, wait
from .models import Model, open_model

screen = Console(width=150)
GIB = 1 << 30


def main(arguments: list[str] | None = None) -> None:
    args, start = _arguments(arguments), time.perf_counter()
    unique = 7 if args.synthetic == "flash" else None
    model = open_model(Synthetic(args.synthetic, unique_layers=unique), args.backend, args.device)
    screen.print(f"loaded after {time.perf_counter() - start:.1f} s")
    runner = model.runner(2, args.tokens + 256, args.chunk, args.tokens if args.sampled else 0)
    runner.identity = lambda: "bench"
    if args.check:
        held = list(runner.lengths)
        check(model, runner)
        runner.lengths = held
    ids = model.tokens(args.tokens)
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        row = {
            "bench": "snapshot",
            "model": args.synthetic,
            "tokens": args.tokens,
            **measure(model, runner, ids, Path(folder), args.sampled),
            **describe(model.be.device),
        }
    screen.print(row)
    if args.out:
        with Path(args.out).open("a") as file:
            file.write(json.dumps(row) + "\n")


def _arguments(given: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="restoring a long prefix")
    parser.add_argument("--synthetic", default="flash", help="flash, tiny, demo or a folder")
    parser.add_argument("--tokens", type=int, default=100_000)
    parser.add_argument("--no-check", dest="check", action="store_false")
    parser.add_argument("--chunk", type=int, default=2048)
    parser.add_argument("--sampled", action="store_true", help="prefill three chunks only")
    parser.add_argument("--backend", default="cuda")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--folder", help="where files are written; default the temporary folder")
    parser.add_argument("--out", help="append a JSON line")
    return parser.parse_args(given)


def feed(runner: Runner, slot: int, ids: list[int]) -> Any:
    for start in range(0, len(ids), runner.max_chunk):
        logits = runner.run({slot: ids[start : start + runner.max_chunk]})
    return runner.be.download(logits).copy()


def check(model: Model, runner: Runner) -> None:
    """Restored and forked sequences continue as the first one does, at all kinds of lengths."""
    cache = PrefixCache(runner, GIB)
    lengths = 1, 127, 128, 129, 300, 2500
    for length in [length for length in lengths if length + 41 <= runner.context]:
        ids = model.tokens(length + 1 + 40)
        runner.rewind(0, 0)
        feed(runner, 0, ids[:length])
        cache.keep(runner, 0, ids[:length])
        snapshot.fork(runner, 0, 1, length)
        want = [feed(runner, 0, part) for part in (ids[length : length + 1], ids[length + 1 :])]
        for how in ("fork", "restore"):
            if how == "restore":
                runner.rewind(1, 0)
                feed(runner, 1, model.tokens(min(400, runner.context)))
                assert cache.resume(runner, 1, ids) == length
            got = [feed(runner, 1, part) for part in (ids[length : length + 1], ids[length + 1 :])]
            same = all(np.array_equal(a, b) for a, b in zip(want, got, strict=True))
            screen.print(f"length {length}, {how}: {'bit-equal' if same else 'DIFFERENT'}")
    screen.print(dict(cache.counts))


def measure(
    model: Model, runner: Runner, ids: list[int], folder: Path, sampled: bool
) -> dict[str, Any]:
    device = model.be.device
    prefill = 0.0 if sampled else whole_prefill(device, runner, ids)
    page = snapshot.page_size(runner)
    snapshot.restore_pages(runner, 1, 0, page, snapshot.save_pages(runner, 0, 0, page))  # compiles
    cache = PrefixCache(runner, 8 * GIB, folder, 8 * GIB)
    row = {"keep_s": timed(device, "keep", lambda: cache.keep(runner, 0, ids))}
    row["write_s"] = timed(device, "write", cache.flush)
    prompt = [*ids, 5]
    row["find_s"] = timed(device, "find", lambda: cache.find(prompt))
    row["memory_s"] = again(
        device, "memory", lambda: expect(cache.resume(runner, 1, prompt), len(ids))
    )
    row["fork_s"] = again(device, "fork", lambda: snapshot.fork(runner, 0, 1, len(ids)))
    nbytes = cache.bytes
    cache.close()
    for name in ("warm", "cold"):
        row[f"disk_{name}_s"] = from_disk(runner, prompt, folder, name == "cold")
    last = ids[:1]
    same = np.array_equal(feed(runner, 0, last), feed(runner, 1, last))
    screen.print("after the long prefix: " + ("bit-equal" if same else "DIFFERENT"))
    row["prefill_s"] = prefill or sampled_prefill(device, runner, ids)
    rates = {
        f"{name}_gb_s": nbytes / row[f"{name}_s"] / 1e9
        for name in ("keep", "memory", "disk_warm", "disk_cold")
    }
    gains = {
        f"{name}_faster": row["prefill_s"] / row[f"{name}_s"]
        for name in ("memory", "disk_warm", "disk_cold")
    }
    figures = {name: round(value, 4) for name, value in (row | rates | gains).items()}
    return {"bytes": nbytes, "prefill": "sampled" if sampled else "whole", **figures}


def whole_prefill(device: str, runner: Runner, ids: list[int]) -> float:
    for _ in range(2):  # the first compiles
        runner.rewind(0, 0)
        seconds = timed(device, "prefill", lambda: feed(runner, 0, ids))
    return seconds


def sampled_prefill(device: str, runner: Runner, ids: list[int]) -> float:
    """Seconds of all chunks, from the first, the middle and the last."""
    size = runner.max_chunk
    count = len(ids) // size
    seconds = []
    for number in (0, count // 2, count - 1):
        start = number * size
        for _ in range(2):  # the first compiles
            runner.lengths[0] = start
            work = partial(feed, runner, 0, ids[start : start + size])
            chunk = timed(device, f"chunk {number}", work)
        seconds.append(chunk)
    return statistics.fmean(seconds) * len(ids) / size


def from_disk(runner: Runner, prompt: list[int], folder: Path, cold: bool) -> float:
    def once() -> float:
        cache = PrefixCache(runner, 8 * GIB, folder, 8 * GIB)
        for file in folder.glob("*/*") if cold else ():
            with file.open("rb") as opened:
                os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        seconds = timed(
            runner.be.device,
            "disk, cold" if cold else "disk",
            lambda: expect(cache.resume(runner, 1, prompt), len(prompt) - 1),
        )
        assert cache.counts["hits_disk"] == 1
        cache.close()
        return seconds

    return statistics.median(once() for _ in range(3))


def expect(got: int, want: int) -> None:
    assert got == want, f"{got} tokens were known, not {want}"


def again(device: str, name: str, work: Callable[[], Any]) -> float:
    return statistics.median(timed(device, name, work) for _ in range(3))


def timed(device: str, name: str, work: Callable[[], Any]) -> float:
    wait(device)
    start = time.perf_counter()
    work()
    wait(device)
    seconds = time.perf_counter() - start
    screen.print(f"{name} {seconds:.4f} s")  # a run that is cut short still tells something
    return seconds


if __name__ == "__main__":
    main()
