"""Meters whose energy is known, on a clock that the test moves."""

import bisect
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

from ds4.power import Reading, Sampler
from ds4.power.source import Scope


@dataclass
class Clock:
    """Seconds that pass only when they are told to."""

    seconds: float = 1000.0

    def __call__(self) -> float:
        return self.seconds

    def sleep(self, seconds: float) -> None:
        self.seconds += seconds


@dataclass(frozen=True)
class Line:
    """Watts along straight lines between points (seconds, watts); two at a time make a step."""

    points: Sequence[tuple[float, float]]

    def watts(self, when: float) -> float:
        after = bisect.bisect_right([t for t, _ in self.points], when)
        if after == len(self.points):
            return self.points[-1][1]
        (t0, w0), (t1, w1) = self.points[after - 1], self.points[after]
        return w0 + (w1 - w0) * (when - t0) / (t1 - t0)

    def joules(self, start: float, end: float) -> float:
        """Exactly."""
        total = 0.0
        for (t0, _), (t1, _) in pairwise(self.points):
            a, b = max(start, t0), min(end, t1)
            if a < b:
                middle = (a + b) / 2
                total += (b - a) * self.watts(middle)
        return total


def constant(watts: float) -> Line:
    return Line([(0.0, watts), (1e6, watts)])


@dataclass
class Meter:
    """Reads a Line. `fault` may change a reading or raise, by the time."""

    line: Line
    clock: Clock
    name: str = "simulated"
    scope: Scope = "chip"
    part: str = "gpu"
    interval_s: float = 0.1
    refresh_s: float = 0.1
    wrap_j: float | None = None
    counts: bool = True
    watts: bool = True
    latency_s: float = 0.0
    fault: Callable[[float, Reading], Reading] = lambda when, reading: reading
    closed: bool = field(default=False)

    def read(self) -> Reading:
        now = self.clock()
        joules = self.line.joules(0.0, now)
        if self.wrap_j:
            joules %= self.wrap_j
        reading = Reading(
            self.line.watts(now) if self.watts else None, joules if self.counts else None
        )
        self.clock.sleep(self.latency_s)
        return self.fault(now, reading)

    def close(self) -> None:
        self.closed = True


def watch(
    clock: Clock, *meters: Meter, seconds: float, jitter: float = 0.0, seed: int = 0
) -> Sampler:
    """A sampler that ran for so long; with `jitter` its thread woke late by up to so much."""
    rng = random.Random(seed)
    sampler = Sampler(meters, clock)
    end = clock() + seconds
    while clock() < end:
        clock.sleep(max(sampler.poll(), 1e-4) + rng.random() * jitter)
    return sampler
