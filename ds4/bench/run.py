"""A whole measurement: warm-up, idle, workloads in random order.

Only speed is known while it runs. Joules are worked out at the end, when the readings of the meters
cover every window.
"""

import random
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from ..errors import BenchError
from ..power.sampler import Sampler, now
from .load import Load
from .measure import Window, figures, window
from .target import Target
from .workload import Workload

_STEADY = 0.05  # two rounds of a warm-up differ by less
_SETTLE_S = 2.0  # after a load, before an idle machine is measured
_ROUNDS = 3
_WARM_TOKENS = 16

Tell = Callable[[str], None]


@dataclass(frozen=True)
class Protocol:
    """How it is measured. `idle_s` 0 measures no idle power."""

    repeat: int = 3
    idle_s: float = 60.0
    warm_s: float = 60.0
    pause_s: float = 5.0
    seed: int = 0

    def quick(self) -> "Protocol":
        """In two minutes."""
        return replace(self, repeat=1, idle_s=8.0, warm_s=6.0, pause_s=0.5)


@dataclass
class Run:
    """One load, over. `phase` is "main", or "prefill" for its prompts alone."""

    recipe: str
    workload: Workload
    phase: str
    repetition: int
    window: Window
    figures: dict[str, Any]
    load: Load


@dataclass
class Measurement:
    """All that was measured, not yet worked out."""

    protocol: Protocol
    begin: float
    epoch_minus_clock: float
    targets: list[dict[str, Any]] = field(default_factory=list)
    runs: list[Run] = field(default_factory=list)
    idle: dict[str, Window] = field(default_factory=dict)  # by recipe
    skipped: list[dict[str, str]] = field(default_factory=list)
    interrupted: bool = False
    end: float = 0.0


@dataclass
class Bench:
    """Measures targets while `sampler` runs. Another clock and sleep are for tests."""

    protocol: Protocol
    sampler: Sampler
    tell: Tell = lambda line: None
    sleep: Callable[[float], None] = time.sleep
    clock: Callable[[], float] = now

    def run(self, targets: Iterable[Target], workloads: Sequence[Workload]) -> Measurement:
        """Every target in turn. Ctrl-C ends it with what there is."""
        found = Measurement(self.protocol, self.clock(), time.time() - self.clock())
        with self.sampler:
            if self.sampler.sources:
                self.sleep(_SETTLE_S)  # the first readings come before anything that counts
            found.begin = self.clock()
            try:
                for target in targets:
                    self._target(target, workloads, found)
                    target.close()
            except KeyboardInterrupt:
                found.interrupted = True
            found.end = self.clock()
        return found

    def _target(self, target: Target, workloads: Sequence[Workload], found: Measurement) -> None:
        protocol, recipe = self.protocol, str(target.about["recipe"])
        found.targets.append(target.about)
        fitting = [one for one in workloads if _fits(one, target, found, recipe)]
        warm_up = target.about.setdefault("warm_up", {})
        for workload in fitting:
            self.tell(f"{recipe} {workload.name}: warm-up, which may compile kernels")
            warm_up[workload.name] = self._warm_up(target, workload)
        if protocol.idle_s:
            self.tell(f"{recipe}: idle for {protocol.idle_s:g} s")
            self.sleep(_SETTLE_S)
            start = self.clock()
            self.sleep(protocol.idle_s)
            found.idle[recipe] = Window(start, self.clock())
        plan = [(one, repetition) for one in fitting for repetition in range(protocol.repeat)]
        random.Random(protocol.seed).shuffle(plan)
        for workload, repetition in plan:
            phases = [("prefill", workload.only_prompts())] if workload.prefill else []
            for phase, load in [*phases, ("main", workload)]:
                self.tell(
                    f"{recipe} {workload.name}: {phase}, {repetition + 1} of {protocol.repeat}"
                )
                self._measure(target, workload, load, phase, repetition, found)
                self.sleep(protocol.pause_s)
        target.about["usage"] = target.usage()

    def _measure(
        self,
        target: Target,
        workload: Workload,
        asked: Workload,
        phase: str,
        repetition: int,
        found: Measurement,
    ) -> None:
        recipe = str(target.about["recipe"])
        try:
            load = self._loaded(target, asked, f"{phase} {repetition}")
        except BenchError as error:
            found.skipped.append(
                {"recipe": recipe, "workload": workload.name, "reason": str(error)}
            )
            return
        at = window(load)
        made = figures(asked, load.records, at)
        found.runs.append(Run(recipe, workload, phase, repetition, at, made, load))

    def _loaded(self, target: Target, workload: Workload, which: str) -> Load:
        """No two loads of a measurement have the same prompts: a cache would know them."""
        name = f"{self.protocol.seed} {which} {workload.name}"
        seed = random.Random(name).getrandbits(31)
        load = Load(workload, target.texts(seed), self.clock(), seed)
        target.run(load)
        return load

    def _warm_up(self, target: Target, workload: Workload) -> dict[str, Any]:
        """Rounds of short requests until two are alike; none begins after `warm_s`.

        Three if there is time: kernels are compiled by the first and recorded by the second.
        """
        limit = self.protocol.warm_s
        short = _short(workload, limit)
        start, last, steady, rounds = self.clock(), 0.0, False, 0
        while (rounds < _ROUNDS or not steady) and (not rounds or self.clock() - start < limit):
            before = self.clock()
            try:
                self._loaded(target, short, f"warm-up {rounds}")
            except BenchError as error:
                return {"rounds": rounds, "steady": False, "error": str(error)}
            took = self.clock() - before
            steady = rounds > 0 and abs(took - last) <= _STEADY * took
            last, rounds = took, rounds + 1
            self.tell(
                f"{target.about['recipe']} {workload.name}: warm-up round {rounds}, {took:.1f} s"
                + ("" if steady else f"; until two are alike, {limit:g} s at most")
            )
        return {"rounds": rounds, "steady": steady, "seconds": self.clock() - start}


def _fits(workload: Workload, target: Target, found: Measurement, recipe: str) -> bool:
    if target.context is None or workload.context <= target.context:
        return True
    reason = f"needs {workload.context:,} tokens of context, there are {target.context:,}"
    found.skipped.append({"recipe": recipe, "workload": workload.name, "reason": reason})
    return False


def _short(workload: Workload, most_seconds: float) -> Workload:
    """What warms a workload up: its first prompts and a few tokens, as many at once."""
    return replace(
        workload,
        kind="closed",
        prompt_tokens=workload.prompt_tokens + workload.shared_tokens,
        shared_tokens=0,
        output_tokens=min(_WARM_TOKENS, workload.output_tokens),
        requests=workload.concurrency,
        seconds=0.0,
        most_seconds=max(most_seconds, 1.0),
    )


def record_entry(run: Run, begin: float) -> list[dict[str, Any]]:
    """The raw samples of a run, in seconds since `begin`."""
    entries = []
    for record in run.load.records:
        entry = asdict(record)
        for name in ("start", "first", "end"):
            if entry[name] is not None:
                entry[name] = round(entry[name] - begin, 6)
        entry["tokens"] = [[round(when - begin, 6), count] for when, count in record.tokens]
        entries.append(entry)
    return entries
