"""Thousands of requests with random cancellation: nothing lost, nothing wrong, nothing left behind.

    OMP_NUM_THREADS=1 python -m bench.soak [--requests 20000] [--backend mlx] [--slots 8]
        [--seconds 3600] [--seed 0] [--exact]

Every tenth request is a canary: one of 16 whose tokens were computed alone before. Without --exact
a canary may differ where bench.engine_equivalence would explain it. Prints a line a thousand
requests; the exit status is 1 if a request was lost, a canary was wrong, or a slot stayed taken.
"""

import argparse
import importlib.util
import os
import sys
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

import ds4
from ds4 import LLM, SamplingParams
from ds4.engine import Engine
from ds4.engine.api import Finished, Grammar, Progress, QueueFull, Request
from ds4.engine.prefix import PrefixCache
from ds4.engine.scheduler import Limits

from .engine_equivalence import Case, Outcome, alone, noise, verdict

CONTEXT = 256
CANARIES = 16
DIGITS = Grammar("regex", "[0-9]{2,4}")
GUIDED = importlib.util.find_spec("llguidance") is not None


@dataclass
class Flight:
    """A request that was submitted, and what came of it so far."""

    request: Request
    canary: int | None
    outcome: Outcome


class Soak:
    """Keeps an engine busy with random requests and checks what it says."""

    def __init__(self, many: LLM, one: LLM, seed: int) -> None:
        self.rng = np.random.default_rng(seed)
        self.noise = noise(many, one, self.rng)
        self.one, self.vocab = one, one.config.vocab_size
        prefixes = PrefixCache(many.runner, 16 << 20)
        self.engine = Engine(many, limits=Limits(waiting=24), chunk=64, prefixes=prefixes)
        self.flights: dict[str, Flight] = {}
        self.counts: Counter[str] = Counter()
        self.canaries = [self._case(number) for number in range(CANARIES)]
        self.wanted = [alone(one, case) for case in self.canaries]

    def _case(self, number: int) -> Case:
        options: dict[str, Any] = {"temperature": 0.0, "max_tokens": 6}
        if number % 2:
            options = {"temperature": 0.9, "seed": number, "max_tokens": 6, "top_p": 0.9}
        prompt = self._prompt(4 + 9 * number)
        request = Request(f"canary{number}", prompt, SamplingParams(**options))
        return Case(request, 0, None, options)

    def _prompt(self, length: int) -> list[int]:
        return self.rng.integers(3, self.vocab - 80, length).tolist()

    def submit(self, number: int) -> bool:
        """One more request; False if the queue is full."""
        canary = int(self.rng.integers(CANARIES)) if number % 10 == 0 else None
        if canary is not None:
            known = self.canaries[canary].request
            request = Request(str(number), known.prompt, known.params)
        else:
            request = self._random(str(number))
        try:
            self.engine.submit(request)
        except QueueFull:
            self.counts["refused"] += 1
            return False
        self.flights[request.id] = Flight(request, canary, Outcome())
        return True

    def _random(self, name: str) -> Request:
        rng = self.rng
        prompt = self._prompt(int(rng.integers(1, 40)))
        if rng.random() < 0.2:
            prompt = [*self.canaries[int(rng.integers(CANARIES))].request.prompt, *prompt]
        params = SamplingParams(
            max_tokens=int(rng.integers(1, 7)), temperature=float(rng.choice([0.0, 1.0]))
        )
        grammar = DIGITS if GUIDED and rng.random() < 0.02 else None
        return Request(name, prompt, params, int(rng.integers(0, 3)), grammar)

    def step(self) -> None:
        if self.flights and self.rng.random() < 0.1:
            victim = list(self.flights)[int(self.rng.integers(len(self.flights)))]
            self.engine.cancel(victim)
        for event in self.engine.step():
            flight = self.flights[event.id]  # a KeyError is an event after the last
            if isinstance(event, Progress):
                continue
            flight.outcome.text += event.text
            if not isinstance(event, Finished):
                flight.outcome.tokens += event.tokens
                continue
            flight.outcome.end = event
            del self.flights[event.id]
            self.counts[event.reason] += 1
            if event.completion_tokens != len(flight.outcome.tokens):
                self.counts["wrong"] += 1
            if flight.canary is not None:
                case, want = self.canaries[flight.canary], self.wanted[flight.canary]
                found = verdict(self.one, case, flight.outcome, want, self.noise)
                self.counts[f"canary {found}"] += 1


def main() -> None:
    args = _arguments()
    many, one = (
        ds4.load("demo", args.backend, "auto", context=CONTEXT, slots=slots)
        for slots in (args.slots, 1)
    )
    soak, start, sent = Soak(many, one, args.seed), time.perf_counter(), 0
    first = 0.0  # megabytes after the first thousand
    while sent < args.requests and time.perf_counter() - start < args.seconds:
        while sent < args.requests and len(soak.flights) < 20 and soak.submit(sent):
            sent += 1
            if sent % 1000 == 0:
                first = first or _resident()
                seconds = time.perf_counter() - start
                print(f"{sent} in {seconds:.0f} s, {_resident():.0f} MB {dict(soak.counts)}")
                sys.stdout.flush()
        soak.step()
    while soak.engine.has_work():
        soak.step()
    stats, ended = soak.engine.stats(), sum(soak.engine.stats().finished.values())
    print(
        f"{many.backend_name}: {sent} requests, {ended} ended, {len(soak.flights)} lost, "
        f"{stats.running} slots taken, {stats.waiting} waiting; memory {first:.0f} MB after the "
        f"first thousand, {_resident():.0f} MB now; {stats.generated_tokens} tokens, "
        f"{stats.cached_tokens} of {stats.prompt_tokens} prompt tokens reused; {dict(soak.counts)}"
    )
    bad = soak.counts["wrong"] + soak.counts["canary wrong"] + soak.counts["error"]
    bad += soak.counts["canary explained"] if args.exact else 0
    sys.exit(bool(bad or soak.flights or ended != sent or stats.running or stats.waiting))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="thousands of requests on the demo model")
    parser.add_argument("--requests", type=int, default=20_000)
    parser.add_argument("--backend", default="mlx")
    parser.add_argument("--slots", type=int, default=8)
    parser.add_argument("--seconds", type=float, default=3600, help="stop after so long")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--exact", action="store_true", help="canaries must not differ at all")
    return parser.parse_args()


def _resident() -> float:
    """Megabytes of memory that this process holds."""
    status = Path("/proc/self/statm")
    if not status.exists():
        return float("nan")
    return int(status.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6


if __name__ == "__main__":
    main()
