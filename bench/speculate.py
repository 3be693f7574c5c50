"""What verifying guesses costs, and what guessing brings, with guesses that are right by chance.

    python -m bench.speculate [--synthetic flash] [--batches 1,4,8,16] [--chances 0.5,0.7,0.9]
        [--backend cuda] [--device auto] [--context 512] [--out bench/results/speculate.jsonl]

First a step of 1 to 6 rows for each sequence, as verification runs it, beside a plain decode step.
Then one sequence makes text with the adaptive policy and with each fixed length, where a coin says
whether a guess was right, beside what the times of the first part predict.
"""

import argparse
import json
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from ds4.draft.drafter import Ask
from ds4.draft.lookup import Lookup
from ds4.draft.policy import Policy
from ds4.draft.speculate import Round, Speculator, Turn
from ds4.loader import Synthetic
from ds4.runner import Runner
from ds4.sampler import Sampler, SamplingParams

from .machine import Clock, describe
from .models import Model, free, open_model

ROWS = 6
WARM, STEPS = 3, 7
screen = Console(width=150)


class Coin(Lookup):
    """Guesses that mean nothing."""

    def propose(self, asks: Sequence[Ask]) -> list[list[int]]:
        return [[7] * ask.count for ask in asks]


class Fixed(Policy):
    def length(self, batch: int) -> int:
        return self.longest


class Tossed(Speculator):
    """A guess is right if a coin says so; all the work is done as if it were checked."""

    def __init__(self, runner: Runner, policy: Policy, chance: float) -> None:
        super().__init__(runner, Coin(ROWS - 1), policy)
        self.chance, self.rng = chance, np.random.default_rng(0)

    def _verify(self, turns: Sequence[Turn], guesses: Sequence[list[int]]) -> list[Round]:
        super()._verify(turns, guesses)
        rounds = []
        for turn, guess in zip(turns, guesses, strict=True):
            right = 0
            while right < len(guess) and self.rng.random() < self.chance:
                right += 1
            end = len(turn.text) + right
            self.runner.lengths[turn.slot] = end
            rounds.append(Round([7] * (right + 1), len(guess)))
        return rounds


def main(arguments: list[str] | None = None) -> None:
    args, start = _arguments(arguments), time.perf_counter()
    unique = 7 if args.synthetic == "flash" else None
    model = open_model(Synthetic(args.synthetic, unique_layers=unique), args.backend, args.device)
    screen.print(f"loaded after {time.perf_counter() - start:.1f} s")
    common = {"bench": "speculate", "model": args.synthetic, **describe(model.be.device)}
    steps: list[float] = []
    for batch in args.batches:
        times = step_times(model, batch, args.context)
        steps = steps or times
        keep(
            args.out,
            common | {"kind": "steps", "batch": batch, "context": args.context, "ms": times},
        )
        free(model.be.device)
    for chance in args.chances:
        row = texts(model, args.context, chance, steps, args.tokens)
        keep(args.out, common | {"kind": "text", "chance": chance, **row})
        free(model.be.device)


def _arguments(given: list[str] | None) -> argparse.Namespace:
    def numbers(kind: Any) -> Any:
        return lambda text: [kind(part) for part in text.split(",")]

    parser = argparse.ArgumentParser(description="what guessing costs and brings")
    parser.add_argument("--synthetic", default="flash", help="flash, tiny, demo or a folder")
    parser.add_argument("--batches", type=numbers(int), default=[1, 4, 8, 16])
    parser.add_argument("--chances", type=numbers(float), default=[0.5, 0.7, 0.9])
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--tokens", type=int, default=300)
    parser.add_argument("--backend", default="cuda")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--out", help="append JSON lines")
    return parser.parse_args(given)


def keep(file: str | None, row: dict[str, Any]) -> None:
    screen.print(row)
    if file:
        with Path(file).open("a") as out:
            out.write(json.dumps(row) + "\n")


def step_times(model: Model, batch: int, context: int) -> list[float]:
    """Milliseconds of a step with 1 to ROWS rows a sequence."""
    runner = model.runner(batch, context, min(256, context), length=context - ROWS - 1)
    times = []
    for rows in range(1, ROWS + 1):

        def step(rows: int = rows) -> None:
            tokens: dict[int, Sequence[int]] = {s: model.tokens(rows) for s in range(batch)}
            runner.run(tokens, pad_to=batch * rows, every_row=True)
            runner.lengths = [context - ROWS - 1] * batch

        for _ in range(WARM):
            step()
        clock = Clock(model.be.device)
        clock.mark()
        for _ in range(STEPS):
            step()
            clock.mark()
        times.append(round(statistics.median(clock.intervals()) * 1e3, 3))
    return times


def texts(
    model: Model, context: int, chance: float, steps: list[float], tokens: int
) -> dict[str, Any]:
    """Tokens a second with the policy and with each fixed length, and what was to be expected."""
    got: dict[str, float] = {}
    want: dict[str, float] = {}
    runner = model.runner(1, context, min(256, context), length=context // 2)
    for count in range(ROWS):
        got[str(count)] = text_speed(runner, Fixed(count), chance, tokens // 3, context, warm=3)
        brings = sum(chance**n for n in range(count + 1))
        want[str(count)] = brings / steps[count] * 1e3
    adaptive = text_speed(runner, Policy(ROWS - 1), chance, tokens, context, warm=40)
    return {
        "tok_s": {name: round(speed, 1) for name, speed in got.items()},
        "model_tok_s": {name: round(speed, 1) for name, speed in want.items()},
        "adaptive_tok_s": round(adaptive, 1),
        "of_best_fixed": round(adaptive / max(got.values()), 3),
        "of_plain": round(adaptive / got["0"], 3),
    }


def text_speed(
    runner: Runner, policy: Policy, chance: float, tokens: int, context: int, warm: int
) -> float:
    speculator = Tossed(runner, policy, chance)
    sampler = Sampler(SamplingParams(temperature=0.0), [], runner.cfg.vocab_size)
    start = length = context // 2
    done, begun = 0, 0.0
    while done < tokens:
        if warm == 0:
            begun, done = time.perf_counter(), 0
        warm -= 1
        runner.lengths[0] = length
        (came,) = speculator.round([Turn(0, [7] * (length + 1), sampler, ROWS)])
        done += len(came.tokens) if warm < 0 else 0
        length += len(came.tokens)
        if length > context - 2 * ROWS:
            length = start
    return done / (time.perf_counter() - begun)


if __name__ == "__main__":
    main()
