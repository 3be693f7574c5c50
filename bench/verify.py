"""Steps that verify guesses of many sequences, replayed from a graph and launched one by one.

    python -m bench.verify [--synthetic flash] [--recipe native] [--unique-layers 7]
        [--layers 43] [--cache native] [--batches 8,16] [--rows 2,3,4,5,6] [--drafter dspark]
        [--kernels 40,96] [--device auto] [--out bench/results/verify.jsonl]

Of each shape: whether logits from the graph are those of the same step launched one by one, to the
bit; what both take; and what memory the recordings have. Of some lengths the kernels that take
longest. Then the same at a longer length, where the indexer chooses, with a drafter that watches,
what its own step takes, and a chunk of a prompt (which is padded) that it watches.
"""

import argparse
import json
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from ds4.draft.drafter import Ask
from ds4.draft.dspark import Dspark
from ds4.draft.mtp import Mtp
from ds4.loader import Synthetic
from ds4.runner import Runner
from ds4.sampler import Sampler, SamplingParams
from ds4.step import Chunk, plan, watched
from ds4.weights.load import load_drafter
from ds4.weights.synthetic import SyntheticCheckpoint

from .machine import Clock, describe, wait
from .models import Model, free, open_model
from .operations import by_kernel, trace

CHECKS, RUNS, CHUNK = 3, 5, 100
SHORT, LONG = 500, 4000  # positions before a step


def main(arguments: list[str] | None = None) -> None:
    args = _arguments(arguments)
    unique = None if args.layers else args.unique_layers or None
    synthetic = Synthetic(args.synthetic, args.recipe, unique, layers=args.layers)
    model = open_model(synthetic, "cuda", args.device, args.cache)
    common = {"bench": "verify", "model": args.synthetic, "recipe": args.recipe}
    common |= {"layers": model.cfg.num_hidden_layers, "cache": args.cache}
    common |= describe(model.be.device)

    def keep(row: dict[str, Any]) -> None:
        print(row, flush=True)
        if args.out:
            with Path(args.out).open("a") as out:
                out.write(json.dumps(common | row) + "\n")

    for batch in args.batches:
        steps = Steps(model, batch, SHORT)
        for rows in args.rows:
            keep({"batch": batch, "rows": rows} | steps.row(rows))
            if batch * rows in args.kernels:
                steps.kernels(rows)
        free(model.be.device)
    if not args.drafter:
        return
    made = SyntheticCheckpoint(model.cfg, recipe=model.source.recipe, drafter=args.drafter)
    own = load_drafter(model.be, model.cfg, made)
    for batch in args.batches:
        steps = Steps(model, batch, LONG, own)
        keep({"batch": batch, "rows": 5, "watched_by": own.kind} | steps.row(5))
        keep({"batch": batch, "drafter": own.kind} | steps.draft())
        keep({"chunk": CHUNK, "watched_by": own.kind} | steps.compared(steps.prompt))
        free(model.be.device)


class Steps:
    """Of so many sequences, at the same positions again and again: what a step writes it reads."""

    def __init__(self, model: Model, batch: int, length: int, own: Any = None) -> None:
        self.model, self.batch, self.length = model, batch, length
        self.runner: Runner = model.runner(batch, length + 2 * CHUNK, 256, length=length)
        self.drafter: Any = None
        if own is not None:
            self.drafter = (Mtp if own.kind == "mtp" else Dspark)(self.runner, own)
            self.runner.attach(self.drafter)

    def chunks(self, rows: int) -> dict[int, list[int]]:
        return {slot: self.model.tokens(rows) for slot in range(self.batch)}

    def prompt(self) -> dict[int, list[int]]:
        return {0: self.model.tokens(CHUNK)}

    def run(self, chunks: dict[int, list[int]]) -> torch.Tensor:
        """As a Speculator does, or of a prompt."""
        self.runner.lengths = [self.length] * self.batch
        count, every = _shape(chunks)
        logits: torch.Tensor = self.runner.run(chunks, pad_to=count, every_row=every)
        return logits

    def launch(self, chunks: dict[int, list[int]]) -> torch.Tensor:
        """The same, launched one by one."""
        from ds4.backends.cuda.graph import accompanied, padded

        model, (count, every) = self.model, _shape(chunks)
        ratios = sorted({ratio for ratio in model.cfg.compress_ratios if ratio})
        given = [Chunk(slot, self.length, ids) for slot, ids in chunks.items()]
        step = plan(given, ratios, count, every_row=every)
        step = watched(step, self.drafter.near) if self.drafter else step
        if not every:  # as the backend shapes it
            step = accompanied(step) if model.be.cache == "exact" else padded(step)
        logits: torch.Tensor = self.runner._on_device(step.on(model.be))
        return logits if every else logits[:1]

    def row(self, rows: int) -> dict[str, Any]:
        return self.compared(lambda: self.chunks(rows))

    def compared(self, some: Callable[[], dict[int, list[int]]]) -> dict[str, Any]:
        graphs: Any = self.runner._forward
        before, recorded = torch.cuda.memory_reserved(), graphs.recorded
        for _ in range(2):
            self.run(some())
        alike = []
        for _ in range(CHECKS):
            chunks = some()
            got = self.run(chunks).clone()
            alike.append(torch.equal(got, self.launch(chunks)))
        found = {
            "length": self.length,
            "recorded": graphs.recorded - recorded,
            "alike": f"{sum(alike)} of {CHECKS}",
            "reserved_mb": round((torch.cuda.memory_reserved() - before) / 1e6),
            "free_mb": round(torch.cuda.mem_get_info()[0] / 1e6),
        }
        found["ms"] = statistics.median(self.times(lambda: self.run(some())))
        launched = self.times(lambda: self.launch(some()))
        return found | {"launched_ms": statistics.median(launched), "each_launched_ms": launched}

    def times(self, work: Callable[[], object]) -> list[float]:
        """Milliseconds of RUNS calls, which the host begins as early as it can."""
        work()
        clock = Clock(self.model.be.device)
        clock.mark()
        for _ in range(RUNS):
            work()
            clock.mark()
        return [round(1e3 * seconds, 3) for seconds in clock.intervals()]

    def kernels(self, rows: int) -> None:
        """The longest of a step, as launched."""

        def waited() -> None:
            self.launch(self.chunks(rows))
            wait(self.model.be.device)

        found = by_kernel(trace(waited))
        total = sum(seconds for _, seconds in found.values())
        print(f"{self.batch * rows} rows: {1e3 * total:.3f} ms in kernels", flush=True)
        for name, (count, seconds) in sorted(found.items(), key=lambda one: -one[1][1])[:16]:
            print(
                f"{1e3 * seconds:8.3f} ms {count:5} x {seconds / count * 1e6:8.1f} us {name[:90]}"
            )

    def draft(self) -> dict[str, Any]:
        sampler = Sampler(SamplingParams(temperature=0.0), [], self.model.cfg.vocab_size)
        text = [7] * (self.length + 1)
        found = {}
        for count in (1, self.drafter.longest):
            asks: Sequence[Ask] = [Ask(slot, text, count, sampler) for slot in range(self.batch)]
            for _ in range(2):
                self.drafter.propose(asks)
            times = self.times(lambda asks=asks: self.drafter.propose(asks))  # type: ignore[misc]
            found[f"guesses_{count}_ms"] = statistics.median(times)
        return found


def _shape(chunks: dict[int, list[int]]) -> tuple[int, bool]:
    """Tokens to pad to, and whether all rows have logits: of several sequences, not of a prompt."""
    return (sum(map(len, chunks.values())), True) if len(chunks) > 1 else (0, False)


def _arguments(given: list[str] | None) -> argparse.Namespace:
    def numbers(text: str) -> list[int]:
        return [int(part) for part in text.split(",")] if text else []

    parser = argparse.ArgumentParser(description="steps that verify guesses of many sequences")
    parser.add_argument("--synthetic", default="flash")
    parser.add_argument("--recipe", default="native")
    parser.add_argument("--unique-layers", type=int, default=7, help="0: all; tiny has fewer")
    parser.add_argument("--layers", type=int, help="only so many, each of its own")
    parser.add_argument("--cache", choices=("native", "exact"), default="native")
    parser.add_argument("--batches", type=numbers, default=[8, 16])
    parser.add_argument("--rows", type=numbers, default=[2, 3, 4, 5, 6])
    parser.add_argument("--drafter", default="dspark", help="mtp or dspark; empty: none")
    parser.add_argument("--kernels", type=numbers, default=[40, 96], help="rows in all")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--out", help="append JSON lines")
    args = parser.parse_args(given)
    if args.out:
        Path(args.out).parent.mkdir(parents=True, exist_ok=True)
    return args


if __name__ == "__main__":
    main()
