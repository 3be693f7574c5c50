"""Where the time of a round of guesses goes that a step run ahead of the host does not take.

    python -m bench.rounds [--synthetic tiny] [--backend torch] [--device auto] [--rounds 60]

For 1 to 5 guesses, medians in microseconds: `alone`, a step and the choice of its tokens where
others are queued behind it; `round`, from one round's tokens to the next one's; of that `host`,
from the tokens to the end of the call that begins the next step (on a CPU, which computes within
that call, to its beginning), and `device`, from the beginning of that step's work there to its
tokens.
"""

import argparse
import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

from ds4.draft.policy import Policy, Record
from ds4.draft.times import RECENT
from ds4.loader import Synthetic
from ds4.runner import Runner
from ds4.sampler import Sampler, pick

from .coin import GREEDY, ROWS, Coin, Script, Text, Tossed
from .machine import Clock
from .models import Model, open_model

WARM, CHANCE = 4, 0.7


class Asked(Policy):
    """Thinks about how many to guess, and once it knows enough for that guesses always so many."""

    def __init__(self, count: int) -> None:
        super().__init__(ROWS - 1, alike=True)
        self.count = count

    def lengths(self, records: Sequence[Record], most: Sequence[int]) -> list[int]:
        super().lengths(records, most)
        return [self.count if self.costs.known(1) else 0]

    def foresee(self, records: Sequence[Record], most: Sequence[int]) -> list[int]:
        return self.lengths(records, most)


class Moments:
    """When tokens were known and steps begun on the host, and how long these took the device."""

    def __init__(self, device: str) -> None:
        self.device = Clock(device)
        self.known, self.begun = list[float](), list[float]()

    @contextmanager
    def of(self, runner: Runner) -> Iterator[None]:
        """While this lasts."""
        forward, download = runner._forward, runner.be.download

        def begin(step: Any) -> Any:
            self.device.mark()
            before = time.perf_counter()
            logits = forward(step)
            self.begun.append(before if runner.be.device == "cpu" else time.perf_counter())
            return logits

        def wait(x: Any) -> Any:
            self.device.mark()
            tokens = download(x)
            self.known.append(time.perf_counter())
            return tokens

        be: Any = runner.be
        with patch.object(runner, "_forward", begin), patch.object(be, "download", wait):
            yield

    def row(self) -> dict[str, int]:
        """Of the rounds after the first."""
        rounds = [b - a for a, b in zip(self.known, self.known[1:], strict=False)]
        host = [begun - known for known, begun in zip(self.known, self.begun[1:], strict=False)]
        return {
            "round_us": _middle(rounds),
            "host_us": _middle(host),
            "device_us": _middle(self.device.intervals()[2::2]),
        }


def rows(model: Model, runner: Runner, rounds: int) -> Iterator[dict[str, int]]:
    """One for each number of guesses, of so many rounds."""
    for guesses in range(1, ROWS):
        script = Script(model, (CHANCE,))
        text = Text(Tossed(runner, Coin(), Asked(guesses)), [script])
        script.ahead(ROWS * (RECENT + WARM + rounds))
        while not text.speculator.policy.costs.known(1):
            text.go_on()
        for _ in range(WARM):
            text.go_on()
        moments = Moments(model.be.device)
        with moments.of(runner):
            for _ in range(rounds):
                text.go_on()
        yield {"guesses": guesses, "alone_us": alone(model, runner, guesses + 1, rounds)} | (
            moments.row()
        )


def alone(model: Model, runner: Runner, rows: int, count: int) -> int:
    """Of steps of so many rows, each begun before the one before it is over."""
    length = runner.lengths[0] = runner.context // 2
    sampler, clock = Sampler(GREEDY, [], runner.cfg.vocab_size), Clock(model.be.device)
    clock.mark()
    for _ in range(count):
        logits = runner.run({0: model.tokens(rows)}, pad_to=rows, every_row=True)
        pick(model.be, logits, [(sampler, length + row) for row in range(rows)])
        runner.lengths[0] = length
        clock.mark()
    return _middle(clock.intervals()[1:])


def _middle(seconds: Sequence[float]) -> int:
    return round(1e6 * statistics.median(seconds))


def main() -> None:
    parser = argparse.ArgumentParser(description="where the time of a round of guesses goes")
    parser.add_argument("--synthetic", default="tiny", help="flash, tiny, demo or a folder")
    parser.add_argument("--backend", default="torch")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--rounds", type=int, default=60)
    args = parser.parse_args()
    unique = 7 if args.synthetic == "flash" else None
    synthetic = Synthetic(args.synthetic, unique_layers=unique)
    model = open_model(synthetic, args.backend, args.device)
    for row in rows(model, model.runner(1, 512, 256, length=256), args.rounds):
        print(row)


if __name__ == "__main__":
    main()
