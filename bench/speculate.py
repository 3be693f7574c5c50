"""What verifying guesses costs, and what guessing brings, with guesses that are right by chance.

    python -m bench.speculate [--synthetic flash] [--batches 1,4,8,16] [--chances 0.5,0.7,0.9,mixed]
        [--gpu-memory 64GB] [--backend cuda] [--device auto] [--context 512] [--tokens 300]
        [--out bench/results/speculate.jsonl]

First a step of 1 to 6 rows for one sequence, as verification runs it, beside a plain decode step.
Then the sequence makes text with the adaptive policy and with each fixed length, where a coin says
whether a guess was right, beside what the times of the first part predict; "mixed" changes the
coin every 64 tokens. Then steps of more sequences. With --gpu-memory it is the 5090x2 stand-in of
bench.offload: all layers have their own weights, a part of whose experts is in host memory.

A round counts the tokens that the coin brings on average, so that its luck is not in the speeds.
"""

import argparse
import itertools
import json
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from ds4.draft.drafter import Ask, Draft
from ds4.draft.lookup import Lookup
from ds4.draft.policy import Policy, Record
from ds4.draft.speculate import Round, Speculator, Turn
from ds4.loader import Synthetic
from ds4.runner import Runner
from ds4.sampler import Sampler, SamplingParams, pick

from . import offload
from .machine import Clock, describe
from .models import Model, free, open_model

ROWS = 6
WARM, STEPS = 3, 7
STRETCH = 64  # tokens for which a mixed text is alike
MIXED = (0.9, 0.2, 0.7, 0.5, 0.0)  # chances of its stretches
SETTLE = 200  # plain steps after which experts are where they are wanted
PROMPT = 256  # tokens really run where caches cannot be made up
SAME = ("bench", "device", "driver", "torch", "triton", "commit", "date")  # in all rows
GREEDY = SamplingParams(temperature=0.0)
screen = Console(width=150)


class Coin(Lookup):
    """Guesses that mean nothing, of the tokens that a text has."""

    def __init__(self, model: Model) -> None:
        super().__init__(ROWS - 1)
        self.model = model

    def propose(self, asks: Sequence[Ask]) -> Draft:
        return Draft([self.model.tokens(ask.count) for ask in asks])


class Fixed(Policy):
    def lengths(self, records: Sequence[Record], most: Sequence[int]) -> list[int]:
        return [min(self.longest, count) for count in most]


class Tossed(Speculator):
    """A guess is right if a coin says so; all the work is done as if it were checked.

    `brought` is how many tokens a round brings on average, summed; `chance` may be changed.
    """

    def __init__(self, runner: Runner, model: Model, policy: Policy) -> None:
        super().__init__(runner, Coin(model), policy)
        self.chance, self.brought, self.rng = 0.0, 0.0, np.random.default_rng(0)

    def _verify(self, turns: Sequence[Turn], draft: Draft) -> list[Round]:
        super()._verify(turns, draft)
        rounds = []
        for turn, guess in zip(turns, draft.guesses, strict=True):
            right = 0
            while right < len(guess) and self.rng.random() < self.chance:
                right += 1
            self.runner.lengths[turn.slot] = len(turn.text) + right
            self.brought += brings(self.chance, len(guess))
            rounds.append(Round([turn.text[-1], *guess][: right + 1], len(guess)))
        return rounds


def brings(chance: float, guesses: int) -> float:
    """Tokens of a round, on average."""
    return sum(chance**n for n in range(guesses + 1))


def main(arguments: list[str] | None = None) -> None:
    args, start = _arguments(arguments), time.perf_counter()
    model = open_stand_in(args) if args.gpu_memory else open_resident(args)
    screen.print(f"loaded after {time.perf_counter() - start:.1f} s")
    common = {"bench": "speculate", "model": args.synthetic, "gpu_memory": args.gpu_memory}
    common |= {"context": args.context, **describe(model.be.device)}

    def steps(batch: int) -> list[float]:
        times = []
        for rows, ms in enumerate(step_times(model, batch, args.context), 1):
            times.append(ms)
            keep(args.out, common | {"kind": "step", "batch": batch, "rows": rows, "ms": ms})
        free(model.be.device)
        return times

    first = steps(1)
    for chance in args.chances:
        row = texts(model, args.context, chance, first, args.tokens)
        keep(args.out, common | {"kind": "text", "chance": chance, **row})
        free(model.be.device)
    for batch in args.batches:
        if batch > 1:
            steps(batch)


def _arguments(given: list[str] | None) -> argparse.Namespace:
    def chances(text: str) -> list[float | str]:
        return [part if part == "mixed" else float(part) for part in text.split(",")]

    parser = argparse.ArgumentParser(description="what guessing costs and brings")
    parser.add_argument("--synthetic", default="flash", help="flash, tiny, demo or a folder")
    parser.add_argument(
        "--batches", type=lambda s: [int(n) for n in s.split(",")], default=[1, 4, 8, 16]
    )
    parser.add_argument("--chances", type=chances, default=[0.5, 0.7, 0.9, "mixed"])
    parser.add_argument("--gpu-memory", help="experts beyond it in host memory: 64GB")
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--tokens", type=int, default=300)
    parser.add_argument("--backend", default="cuda")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--out", help="append JSON lines")
    args = parser.parse_args(given)
    if args.out:
        Path(args.out).parent.mkdir(parents=True, exist_ok=True)
    return args


def open_resident(args: argparse.Namespace) -> Model:
    unique = 7 if args.synthetic == "flash" else None
    return open_model(Synthetic(args.synthetic, unique_layers=unique), args.backend, args.device)


def open_stand_in(args: argparse.Namespace) -> Model:
    """With some experts in host memory and skewed routing, settled."""
    options = ["--gpu-memory", args.gpu_memory, "--prompt", "0", "--synthetic", args.synthetic]
    bench = offload.Bench(offload._arguments(options))
    bench.start()
    bench.route("skewed")
    synthetic = Synthetic(args.synthetic, routing="skewed")
    model = Model(synthetic, bench.cfg, bench.be, bench.weights, bench.source)
    runner = runner_at(model, 1, args.context, min(64, args.context // 2))
    for _ in range(SETTLE):
        if runner.lengths[0] == args.context:
            runner.lengths[0] = 64
        runner.run(model.next_tokens(1))
    return model


def keep(file: str | None, row: dict[str, Any]) -> None:
    screen.print({name: value for name, value in row.items() if name not in SAME})
    if file:
        with Path(file).open("a") as out:
            out.write(json.dumps(row) + "\n")


def runner_at(model: Model, slots: int, context: int, length: int) -> Runner:
    """Caches that hold so many tokens a slot."""
    chunk = min(PROMPT, context)
    if getattr(model.be, "placement", None) is None:
        return model.runner(slots, context, chunk, length=length)
    runner = model.runner(slots, context, chunk)
    for slot, _ in itertools.product(range(slots), range(0, length, 32)):
        count = min(32, length - runner.lengths[slot])
        runner.run({slot: model.tokens(count)})
    return runner


def step_times(model: Model, batch: int, context: int) -> Iterator[float]:
    """Milliseconds of a step with 1 to ROWS rows a sequence."""
    length = context - ROWS - 1
    runner = runner_at(model, batch, context, length)
    for rows in range(1, ROWS + 1):

        def step(rows: int = rows) -> None:
            tokens: dict[int, Sequence[int]] = {s: model.tokens(rows) for s in range(batch)}
            runner.run(tokens, pad_to=batch * rows, every_row=True)
            runner.lengths = [length] * batch

        for _ in range(WARM):
            step()
        clock = Clock(model.be.device)
        clock.mark()
        for _ in range(STEPS):
            step()
            clock.mark()
        yield round(statistics.median(clock.intervals()) * 1e3, 3)


def texts(
    model: Model, context: int, chance: float | str, steps: Sequence[float], tokens: int
) -> dict[str, Any]:
    """Tokens a second with the policy and with each fixed length, and what was to be expected."""
    stretches = MIXED if isinstance(chance, str) else (chance,)
    period = STRETCH * len(stretches) if isinstance(chance, str) else 1
    few = max(period, tokens // 3)
    got: dict[str, float] = {}
    want: dict[str, float] = {}
    runner = runner_at(model, 1, context, context // 2)

    def speed(policy: Policy, tokens: int, warm: int) -> float:
        speculator = Tossed(runner, model, policy)
        return text_speed(speculator, stretches, tokens, context, warm)

    ahead = decode_speed(runner, model, tokens // 3, context)
    for count in range(ROWS):
        got[str(count)] = speed(Fixed(count), few, 3)
        times = [steps[count] / brings(one, count) for one in stretches]
        want[str(count)] = 1e3 / statistics.fmean(times)
    adaptive = speed(Policy(ROWS - 1), max(period, tokens), 40)
    return {
        "tok_s": {name: round(speed, 1) for name, speed in got.items()},
        "model_tok_s": {name: round(speed, 1) for name, speed in want.items()},
        "adaptive_tok_s": round(adaptive, 1),
        "decode_ahead_tok_s": round(ahead, 1),
        "of_best_fixed": round(adaptive / max(got.values()), 3),
        "of_plain": round(adaptive / got["0"], 3),
    }


def decode_speed(runner: Runner, model: Model, tokens: int, context: int) -> float:
    """Plain decoding as the engine does it, a step ahead of the host; the tokens are random."""
    be, sampler = model.be, Sampler(GREEDY, [], runner.cfg.vocab_size)
    runner.lengths[0] = start = context // 2
    before: Any = None

    def step() -> None:
        nonlocal before
        if runner.lengths[0] >= context - 2 * ROWS:
            runner.lengths[0] = start
        token = be.upload(np.array(model.next_tokens(1)[0], np.int32))
        picked = pick(be, runner.run_ahead([0], token), [(sampler, runner.lengths[0])])
        if before is not None:
            be.download(before)
        before = picked

    return tokens / _seconds(step, tokens, warm=4)


def _seconds(step: Callable[[], None], count: int, warm: int) -> float:
    for _ in range(warm):
        step()
    begun = time.perf_counter()
    for _ in range(count):
        step()
    return time.perf_counter() - begun


def text_speed(
    speculator: Tossed, stretches: Sequence[float], tokens: int, context: int, warm: int
) -> float:
    """Tokens a second after `warm` rounds. Stretches take turns, a token of text at a time."""
    runner, model = speculator.runner, speculator.drafter.model  # type: ignore[attr-defined]
    sampler, record = Sampler(GREEDY, [], runner.cfg.vocab_size), speculator.policy.record()
    start = length = context // 2
    made, since, begun = 0, 0.0, 0.0
    while warm >= 0 or made < tokens:
        if warm == 0:
            made, since, begun = 0, speculator.brought, time.perf_counter()
        warm -= 1
        speculator.chance = stretches[made // STRETCH % len(stretches)]
        runner.lengths[0] = length
        text = [7] * length + model.tokens(1)
        (came,) = speculator.round([Turn(0, text, sampler, ROWS, record)])
        made += len(came.tokens)
        length += len(came.tokens)
        if length > context - 2 * ROWS:
            length = start
    return (speculator.brought - since) / (time.perf_counter() - begun)


if __name__ == "__main__":
    main()
