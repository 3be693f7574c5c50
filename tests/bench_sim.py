"""A whole measurement on a clock that nothing waits for: an engine of known speed, meters of known
power."""

from collections.abc import Sequence
from typing import Any

from ds4.bench.cost import Terms
from ds4.bench.results import build
from ds4.bench.run import Bench, Protocol
from ds4.bench.target import EngineTarget
from ds4.bench.texts import TokenTexts
from ds4.bench.workload import Workload
from ds4.power import Sampler
from tests.power_sim import Clock, Meter
from tests.test_bench_load import Metronome

ENVIRONMENT = {
    "machine": {"gpus": ["none found"], "cpu": "A <fast> CPU", "memory": "8 GiB", "platform": "x"},
    "commit": "abc",
    "command": "ds4 bench",
    "time": "2026-01-01T00:00:00Z",
}


class Watched(Clock):
    """A clock whose passing lets a sampler read."""

    sampler: Sampler | None = None

    def sleep(self, seconds: float) -> None:
        end = self.seconds + seconds
        while self.sampler is not None and min(self.sampler._due, default=end) < end:
            self.seconds = max(self.seconds, min(self.sampler._due))
            self.sampler.poll()
        self.seconds = end


class Driven(Sampler):
    """A sampler that the clock drives, without a thread."""

    def __enter__(self) -> "Driven":
        return self

    def __exit__(self, *error: object) -> None:
        self._clock.sleep(2.0)  # type: ignore[attr-defined]


def measured(
    workloads: Sequence[Workload],
    meters: Any = (),
    label: str = "box",
    recipes: Sequence[str] = ("native",),
    protocol: Protocol | None = None,
    terms: Terms | None = None,
    **more: Any,
) -> dict[str, Any]:
    """The object of a results file; `meters` makes Meters of (clock, engine)."""
    clock = Watched()
    engine = Metronome(clock)
    made: list[Meter] = meters(clock, engine) if meters else []
    sampler = Driven(made, clock)
    clock.sampler = sampler
    targets = [
        EngineTarget(
            engine,
            lambda seed: TokenTexts(list(range(1000)), 0, seed),
            {"model": "metronome", "recipe": recipe, "quality": "none", "reached": "in process"},
            5000,
            clock=clock,
            sleep=clock.sleep,
        )
        for recipe in recipes
    ]
    bench = Bench(protocol or Protocol(), sampler, sleep=clock.sleep, clock=clock)
    found = bench.run(targets, workloads)
    absent = [] if made else ["nvml: no GPU"]
    return build(found, sampler.traces, absent, ENVIRONMENT, terms or Terms(2000), label, **more)
