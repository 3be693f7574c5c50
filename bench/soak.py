"""Thousands of requests with random cancellation: nothing lost, nothing wrong, nothing left behind.

    OMP_NUM_THREADS=1 python -m bench.soak [--requests 20000] [--model demo] [--backend mlx]
        [--slots 8] [--speculate off] [--tokens 6] [--cache native] [--seconds 3600] [--seed 0]
        [--exact]

With --speculate, guesses are of random lengths, and half of the texts that are drawn have no seed.

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
from .policies import Restless

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

    def __init__(self, many: LLM, one: LLM, seed: int, tokens: int) -> None:
        self.tokens = tokens  # of an answer, at most
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
        options: dict[str, Any] = {"temperature": 0.0, "max_tokens": self.tokens}
        if number % 2:
            options |= {"temperature": 0.9, "seed": number, "top_p": 0.9}
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
            max_tokens=int(rng.integers(1, self.tokens + 1)),
            temperature=float(rng.choice([0.0, 1.0])),
            seed=int(rng.integers(99)) if rng.random() < 0.5 else None,
            top_k=int(rng.choice([0, 5])),
            presence_penalty=float(rng.choice([0.0, 0.5], p=[0.8, 0.2])),
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
    options: dict[str, Any] = {"context": CONTEXT, "cache": args.cache}
    one = ds4.load(args.model, args.backend, "auto", **options)
    options |= {"slots": args.slots, "speculate": args.speculate}
    many = ds4.load(args.model, args.backend, "auto", **options)
    if many.speculator is not None:
        many.speculator.policy = Restless(many.speculator.drafter.longest)
    soak, start, sent = Soak(many, one, args.seed, args.tokens), time.perf_counter(), 0
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
        f"{stats.cached_tokens} of {stats.prompt_tokens} prompt tokens reused; "
        f"{stats.accepted_tokens} of {stats.drafted_tokens} guesses right; {dict(soak.counts)}"
    )
    bad = soak.counts["wrong"] + soak.counts["canary wrong"] + soak.counts["error"]
    bad += soak.counts["canary explained"] if args.exact else 0
    sys.exit(bool(bad or soak.flights or ended != sent or stats.running or stats.waiting))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="thousands of requests on the demo model")
    parser.add_argument("--requests", type=int, default=20_000)
    parser.add_argument("--backend", default="mlx")
    parser.add_argument("--model", default="demo")
    parser.add_argument("--speculate", choices=("off", "lookup", "mtp", "auto"), default="off")
    parser.add_argument("--tokens", type=int, default=6, help="of an answer, at most")
    parser.add_argument("--cache", choices=("exact", "native"), default="native")
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
