"""What verifying guesses costs, and what guessing brings, with guesses that are right by chance.

    python -m bench.speculate [--synthetic flash] [--batches 1,4,8,16] [--chances 0.5,0.7,0.9,mixed]
        [--drafters coin,mtp,dspark] [--gpu-memory 64GB] [--layers 43] [--backend cuda]
        [--device auto] [--context 512] [--together 1] [--tokens 300] [--texts 3] [--most 5]
        [--out bench/results/speculate.jsonl]

First steps of 1 to 6 rows for some sequences, as verification runs them, beside plain decode steps,
and, with all experts on the GPU, where the time of a round goes (rounds.py).
Then so many sequences together make text, in turn plainly, with each fixed length, and with some
adaptive policies as they begin and once they know the machine. A coin says whether a guess was
right; beside it what the times of the first part predict; "mixed" changes the coin every 64 tokens,
and sequences are not alike. Then drafters of random weights: what a guess takes, what watching adds
to a plain step, and texts made with their guesses. With --gpu-memory it is the 5090x2 stand-in of
bench.offload: part of the experts is in host memory.
"""

import argparse
import itertools
import json
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from ds4.draft.drafter import Ask
from ds4.draft.dspark import Dspark
from ds4.draft.mtp import Mtp
from ds4.loader import Synthetic
from ds4.runner import Runner
from ds4.sampler import Sampler
from ds4.weights.load import load_drafter
from ds4.weights.synthetic import SyntheticCheckpoint

from . import offload, rounds
from .coin import GREEDY, ROWS, Coin, Script, text_row
from .machine import Clock, describe
from .models import Model, free, open_model

WARM, STEPS, PLACED_STEPS = 3, 7, (24, 3)
ROUNDS = 40  # of each length, timed apart from texts
SETTLE = 200  # plain steps after which experts are where they are wanted
CHUNK = 256  # tokens of a prompt at once: none is timed
screen = Console(width=150)


def main(arguments: list[str] | None = None) -> None:
    args, start = _arguments(arguments), time.perf_counter()
    model = open_stand_in(args) if args.gpu_memory else open_resident(args)
    screen.print(f"loaded after {time.perf_counter() - start:.1f} s")
    bench = Bench(args, model)
    for batch in sorted({*args.batches, *args.together}):
        bench.steps(batch)
    if not args.gpu_memory:
        for row in rounds.rows(model, bench.started(1)[0], ROUNDS):
            bench.keep(kind="round", **row)
    for batch in args.together if "coin" in args.drafters else ():
        bench.texts(*bench.started(batch), [0.0] * ROWS)
        free(model.be.device)
    owns = {kind: own_weights(model, kind) for kind in args.drafters if kind != "coin"}
    times = {}
    for (kind, own), batch in itertools.product(owns.items(), args.batches):
        times[kind, batch] = bench.drafts(*bench.started(batch, kind, own))
        free(model.be.device)
    for kind, own in owns.items() if 1 in args.batches else ():
        bench.texts(*bench.started(1, kind, own), times[kind, 1])
        free(model.be.device)


class Bench:
    """Measures a model, and keeps rows of results."""

    def __init__(self, args: argparse.Namespace, model: Model) -> None:
        self.args, self.model = args, model
        self.of_steps: dict[int, list[float]] = {}  # of each batch, ms of a step of 1 to ROWS rows
        self.common = {"bench": "speculate", "model": args.synthetic}
        self.common |= {"gpu_memory": args.gpu_memory, "context": args.context}
        self.common |= {"layers": model.cfg.num_hidden_layers}
        self.common |= describe(model.be.device)

    def started(self, batch: int, kind: str | None = None, own: Any = None) -> tuple[Runner, Any]:
        """Caches half full, and who guesses: a drafter that watches, or none but the coin."""
        model, context = self.model, self.args.context
        runner = model.runner(batch, context, min(CHUNK, context), length=context // 2)
        if kind is None:
            return runner, Coin()
        drafter: Any = {"mtp": Mtp, "dspark": Dspark}[kind](runner, own)
        runner.attach(drafter)
        return runner, drafter

    def steps(self, batch: int) -> None:
        """Of 1 to ROWS rows a sequence, beside the bytes that so many read."""
        times: list[float] = []
        context = self.args.context
        runner = self.model.runner(batch, context, min(CHUNK, context), length=context - ROWS - 1)
        for rows in range(1, ROWS + 1):
            times.append(self.step_ms(runner, rows))
            bytes_of_plain = step_bytes(self.model, batch)
            self.keep(
                kind="step",
                batch=batch,
                rows=rows,
                ms=times[-1],
                of_plain=round(times[-1] / times[0], 3),
                bytes_of_plain=round(step_bytes(self.model, batch * rows) / bytes_of_plain, 3),
            )
        self.of_steps[batch] = times
        free(self.model.be.device)

    def step_ms(self, runner: Runner, rows: int) -> float:
        length, slots = runner.lengths[0], range(runner.slots)

        scripts = [Script(self.model, (0.0,), slot) for slot in slots]

        def step() -> None:
            tokens: dict[int, Sequence[int]] = {s: scripts[s].ahead(rows) for s in slots}
            for script in scripts:
                script.at += rows
            runner.run(tokens, pad_to=runner.slots * rows, every_row=True)
            runner.lengths = [length] * runner.slots

        return self.ms(step, runner.slots)

    def ms(self, work: Callable[[], object], sequences: int = 1) -> float:
        """The median of STEPS times; where experts must be fetched, the mean of more if few are."""
        placed = getattr(self.model.be, "placement", None) is not None
        for _ in range(WARM):
            work()
        clock = Clock(self.model.be.device)
        clock.mark()
        for _ in range(max(PLACED_STEPS[0] // sequences, PLACED_STEPS[1]) if placed else STEPS):
            work()
            clock.mark()
        middle = statistics.fmean if placed else statistics.median
        return round(middle(clock.intervals()) * 1e3, 3)

    def drafts(self, runner: Runner, drafter: Any) -> list[float]:
        """What 0, 1 ... guesses take, and a plain step that is watched."""
        times = [0.0]
        sampler = Sampler(GREEDY, [], runner.cfg.vocab_size)
        self.keep(
            kind="watched",
            drafter=drafter.name,
            batch=runner.slots,
            ms=self.step_ms(runner, 1),
        )
        for count in range(1, drafter.longest + 1):
            asks = [Ask(s, [7] * (n + 1), count, sampler) for s, n in enumerate(runner.lengths)]
            ms = self.ms(lambda asks=asks: drafter.propose(asks))  # type: ignore[misc]
            times.append(ms)
            self.keep(kind="draft", drafter=drafter.name, batch=runner.slots, guesses=count, ms=ms)
        return times

    def texts(self, runner: Runner, drafter: Any, drafts: list[float]) -> None:
        steps = self.of_steps[runner.slots]
        rounds = [step + draft for step, draft in zip(steps, drafts, strict=False)]
        for chance in self.args.chances:
            args = self.args.tokens, self.args.texts, self.args.most
            row = text_row(self.model, runner, drafter, chance, rounds, *args)
            about = {"drafter": drafter.name, "batch": runner.slots, "chance": chance}
            self.keep(kind="text", **about, **row)

    def keep(self, **row: Any) -> None:
        screen.print(row)
        if self.args.out:
            with Path(self.args.out).open("a") as out:
                out.write(json.dumps(self.common | row) + "\n")


def _arguments(given: list[str] | None) -> argparse.Namespace:
    def chances(text: str) -> list[float | str]:
        return [part if part == "mixed" else float(part) for part in text.split(",")]

    def numbers(text: str) -> list[int]:
        return [int(part) for part in text.split(",")]

    parser = argparse.ArgumentParser(description="what guessing costs and brings")
    parser.add_argument("--synthetic", default="flash", help="flash, tiny, demo or a folder")
    parser.add_argument("--batches", type=numbers, default=[1, 4, 8, 16])
    parser.add_argument("--together", type=numbers, default=[1], help="sequences that make text")
    parser.add_argument("--chances", type=chances, default=[0.5, 0.7, 0.9, "mixed"])
    parser.add_argument("--drafters", type=lambda s: s.split(","), default=["coin"])
    parser.add_argument("--gpu-memory", help="experts beyond it in host memory: 64GB")
    parser.add_argument("--layers", type=int, help="only so many")
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--tokens", type=int, default=300)
    parser.add_argument("--texts", type=int, default=3, help="policies whose texts are timed")
    parser.add_argument("--most", type=int, default=ROWS - 1, help="guesses of fixed lengths")
    parser.add_argument("--backend", default="cuda")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--out", help="append JSON lines")
    args = parser.parse_args(given)
    if args.out:
        Path(args.out).parent.mkdir(parents=True, exist_ok=True)
    return args


def open_resident(args: argparse.Namespace) -> Model:
    unique = 7 if args.synthetic == "flash" else None
    synthetic = Synthetic(args.synthetic, unique_layers=unique, layers=args.layers)
    return open_model(synthetic, args.backend, args.device)


def open_stand_in(args: argparse.Namespace) -> Model:
    """With some experts in host memory and skewed routing, settled."""
    options = ["--gpu-memory", args.gpu_memory, "--prompt", "0", "--synthetic", args.synthetic]
    options += ["--layers", str(args.layers)] if args.layers else []
    options += ["--batches", ",".join(map(str, {*args.batches, *args.together}))]
    bench = offload.Bench(offload._arguments(options))
    bench.start()
    bench.route("skewed")
    synthetic = Synthetic(args.synthetic, routing="skewed", layers=args.layers)
    model = Model(synthetic, bench.cfg, bench.be, bench.weights, bench.source)
    runner = model.runner(
        1, args.context, min(CHUNK, args.context), length=min(64, args.context // 2)
    )
    for _ in range(SETTLE):
        if runner.lengths[0] == args.context:
            runner.lengths[0] = 64
        runner.run(model.next_tokens(1))
    return model


def step_bytes(model: Model, tokens: int) -> float:
    """Bytes of weights that a step reads, experts chosen at random."""
    cfg, source = model.cfg, model.source
    unread = "embed.", ".ffn.experts.", ".tid2eid"
    dense = sum(source.nbytes(name) for name in source.shapes if not any(x in name for x in unread))
    last = f"layers.{cfg.num_hidden_layers - 1}.ffn.experts.0.w"
    expert = sum(source.nbytes(f"{last}{n}.weight") for n in (1, 2, 3))
    missed = (1 - cfg.num_experts_per_tok / cfg.n_routed_experts) ** tokens
    return dense + cfg.num_hidden_layers * cfg.n_routed_experts * (1 - missed) * expert


def own_weights(model: Model, kind: Any) -> Any:
    """Of a drafter, as random as the model."""
    source = model.source
    made = SyntheticCheckpoint(model.cfg, source.seed, source.recipe, drafter=kind)
    return load_drafter(model.be, model.cfg, made)


if __name__ == "__main__":
    main()
