"""What users of the engine get, beside what the model alone can do, in one run.

    python -m bench.serving [--synthetic flash] [--recipe native] [--unique-layers 7]
        [--backend cuda] [--device auto] [--users 1,4,8,16,32] [--prompt 512] [--tokens 48]
        [--long 32768] [--restore 100000] [--out bench/results/serving.jsonl]

decode   tokens a second of all users together while all of them decode. Raw is the model fed the
         very same tokens in the same batches, without choosing any and without waiting for the host
alone    greedy logits of one user among others, against the same user alone: bits
ttft     from submission to the first token, all users at once
mixed    between two tokens of a user, before and while a long prompt is absorbed; the prompt's own
         time a chunk, measured without the others
restore  a prefix put back from memory and from disk
"""

import argparse
import gc
import json
import sys
import tempfile
import time
import traceback
from functools import partial
from pathlib import Path

from rich.console import Console

from ds4.engine.prefix import PrefixCache
from ds4.loader import Synthetic
from ds4.runner import Runner

from .machine import describe, wait
from .models import Model, free, open_model
from .serving_cases import Row, alone, decode, mixed, ttft

screen = Console(width=150)


def main() -> None:
    args = _arguments()
    synthetic = Synthetic(args.synthetic, args.recipe, args.unique_layers)
    start = time.perf_counter()
    model = open_model(synthetic, args.backend, args.device)
    most = max(args.users)
    room = max(512, args.prompt + 2 * args.tokens, args.long and args.long + 512)
    runner = Runner(model.be, model.cfg, model.weights, room, most)
    common = {
        "bench": "serving",
        "model": args.synthetic,
        "recipe": args.recipe,
        "unique_layers": args.unique_layers,
        "backend": args.backend,
        **describe(model.be.device),
    }
    screen.print(
        f"{model.be.device}: model and {most} slots in {time.perf_counter() - start:.1f} s"
    )
    first, later = args.users[:3], args.users[3:]
    few = min(8, most)
    steps = [
        *(partial(decode, model, runner, users, args.tokens) for users in first),
        partial(alone, model, runner, few, args.tokens),
        *(
            [partial(mixed, model, runner, min(8, most - 1), args.prompt, args.long)]
            * (args.long > 0)
        ),
        *(partial(ttft, model, runner, users, args.prompt) for users in args.users if users <= 8),
        *(partial(decode, model, runner, users, args.tokens) for users in later),
        partial(decode, model, runner, few, args.tokens, temperature=1.0, top_p=0.95),
    ]
    failed = 0
    for step in steps:
        screen.print(f"{step.func.__name__} {step.args[2:]} ...")
        try:
            _tell(common | step(), args.out, start)
        except Exception:  # the other rows may still be had, and a run is dear
            traceback.print_exc()
            failed = 1
    if args.restore:
        del runner, step
        steps.clear()
        gc.collect()
        free(model.be.device)
        _tell(common | restore(model, args.restore), args.out, start)
    sys.exit(failed)


def _arguments() -> argparse.Namespace:
    def numbers(text: str) -> list[int]:
        return [int(part) for part in text.split(",") if part]

    parser = argparse.ArgumentParser(description="serving, with random weights")
    parser.add_argument("--synthetic", default="flash", help="flash, tiny, demo or a folder")
    parser.add_argument("--recipe", default="native")
    parser.add_argument("--unique-layers", type=int, default=None)
    parser.add_argument("--backend", default="cuda")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--users", type=numbers, default=[1, 4, 8, 16, 32])
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--long", type=int, default=32_768, help="0: no mixed case")
    parser.add_argument("--restore", type=int, default=100_000, help="0: not measured")
    parser.add_argument("--out", help="append a JSON line for each row")
    return parser.parse_args()


def _tell(row: Row, file: str | None, start: float) -> None:
    about = {k: v for k, v in row.items() if k in _SHOWN and v is not None}
    screen.print(f"[{time.perf_counter() - start:5.1f} s]", about, highlight=False)
    if file:
        Path(file).parent.mkdir(parents=True, exist_ok=True)
        with Path(file).open("a") as out:
            out.write(json.dumps(row) + "\n")


def restore(model: Model, length: int) -> Row:
    """A snapshot of a long sequence, whose rows are random: it was never run."""
    runner = model.runner(1, length + 256, 2048, length)
    runner.identity = lambda: "synthetic"
    tokens = model.tokens(length)
    with tempfile.TemporaryDirectory() as folder:
        cache = PrefixCache(runner, 1 << 34, folder, 1 << 34)
        start = time.perf_counter()
        cache.keep(runner, 0, tokens)
        kept = time.perf_counter() - start
        cache.flush()
        memory = _restore(cache, runner, tokens)
        cache.close()
        again = PrefixCache(runner, 1 << 34, folder, 1 << 34)
        disk = _restore(again, runner, tokens)
        nbytes = cache.bytes
        again.close()
    return {
        "kind": "restore",
        "tokens": length,
        "mb": round(nbytes / 1e6),
        "keep_s": round(kept, 3),
        "memory_s": round(memory, 3),
        "disk_s": round(disk, 3),
        "memory_gb_s": round(nbytes / memory / 1e9, 2),
        "disk_gb_s": round(nbytes / disk / 1e9, 2),
    }


def _restore(cache: PrefixCache, runner: Runner, tokens: list[int]) -> float:
    wait(runner.be.device)
    start = time.perf_counter()
    found = cache.resume(runner, 0, [*tokens, 5])
    wait(runner.be.device)
    assert found == len(tokens)
    return time.perf_counter() - start


_SHOWN = {
    "kind", "users", "sampling", "tok_s", "raw_tok_s", "share_of_raw", "warm_up_s", "same_tokens",
    "decode_difference", "packed_prefill_difference", "tokens", "p50_s", "p95_s", "chunk_ms",
    "calm_p50_ms", "busy_p50_ms", "busy_p99_ms", "p99_of_chunk", "prefill_alone_tok_s",
    "prefill_busy_tok_s", "mb", "keep_s", "memory_s", "disk_s", "memory_gb_s", "disk_gb_s",
}  # fmt: skip


if __name__ == "__main__":
    main()
