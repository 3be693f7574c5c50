"""A whole measurement: warm-up, idle, workloads in random order.

Only speed is known while it runs. Joules are worked out at the end, when the readings of the meters
cover every window.
"""

import random
import time
from collections.abc import Callable, Iterator, Sequence
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
        return replace(self, repeat=1, idle_s=8.0, warm_s=3.0, pause_s=0.5)


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


def measure(
    targets: Iterator[Target] | Sequence[Target],
    workloads: Sequence[Workload],
    protocol: Protocol,
    sampler: Sampler,
    tell: Tell = lambda line: None,
    sleep: Callable[[float], None] = time.sleep,
) -> Measurement:
    """Measure every target in turn while `sampler` runs. Ctrl-C ends it with what there is."""
    found = Measurement(protocol, now(), time.time() - now())
    with sampler:
        sleep(_SETTLE_S)  # the first readings come before anything that counts
        found.begin = now()
        try:
            for target in targets:
                _target(target, workloads, found, tell, sleep)
                target.close()
        except KeyboardInterrupt:
            found.interrupted = True
        found.end = now()
    return found


def _target(
    target: Target,
    workloads: Sequence[Workload],
    found: Measurement,
    tell: Tell,
    sleep: Callable[[float], None],
) -> None:
    protocol, recipe = found.protocol, str(target.about["recipe"])
    found.targets.append(target.about)
    fitting = [one for one in workloads if _fits(one, target, found, recipe)]
    for workload in fitting:
        tell(f"{recipe} {workload.name}: warm-up")
        target.about.setdefault("warm_up", {})[workload.name] = _warm_up(target, workload, protocol)
    if protocol.idle_s:
        tell(f"{recipe}: idle for {protocol.idle_s:g} s")
        sleep(_SETTLE_S)
        start = now()
        sleep(protocol.idle_s)
        found.idle[recipe] = Window(start, now())
    plan = [(one, repetition) for one in fitting for repetition in range(protocol.repeat)]
    random.Random(protocol.seed).shuffle(plan)
    for workload, repetition in plan:
        phases = [("prefill", workload.only_prompts())] if workload.prefill else []
        for phase, load in [*phases, ("main", workload)]:
            tell(f"{recipe} {workload.name}: {phase}, {repetition + 1} of {protocol.repeat}")
            _run(target, workload, load, phase, repetition, found)
            sleep(protocol.pause_s)
    target.about["usage"] = target.usage()


def _fits(workload: Workload, target: Target, found: Measurement, recipe: str) -> bool:
    if target.context is None or workload.context <= target.context:
        return True
    reason = f"needs {workload.context:,} tokens of context, there are {target.context:,}"
    found.skipped.append({"recipe": recipe, "workload": workload.name, "reason": reason})
    return False


def _run(
    target: Target,
    workload: Workload,
    asked: Workload,
    phase: str,
    repetition: int,
    found: Measurement,
) -> None:
    try:
        load = _loaded(target, asked, f"{found.protocol.seed} {phase} {repetition}")
    except BenchError as error:
        skipped = {"recipe": target.about["recipe"], "workload": workload.name}
        found.skipped.append(skipped | {"reason": str(error)})
        return
    at = window(load)
    made = figures(asked, load.records, at)
    found.runs.append(Run(str(target.about["recipe"]), workload, phase, repetition, at, made, load))


def _loaded(target: Target, workload: Workload, which: str) -> Load:
    """No two loads of a measurement have the same prompts: a cache would know them."""
    seed = random.Random(f"{which} {workload.name}").getrandbits(31)
    load = Load(workload, target.texts(seed), now(), seed)
    target.run(load)
    return load


def _warm_up(target: Target, workload: Workload, protocol: Protocol) -> dict[str, Any]:
    """Rounds of short requests until two are alike, in `warm_s` if it can be; what came of it.

    Three at least: kernels are compiled by the first and recorded by the second.
    """
    short = replace(
        workload,
        kind="closed",
        prompt_tokens=workload.prompt_tokens + workload.shared_tokens,
        shared_tokens=0,
        output_tokens=min(_WARM_TOKENS, workload.output_tokens),
        requests=workload.concurrency,
        seconds=0.0,
        most_seconds=protocol.warm_s,
    )
    start, last, steady, rounds = now(), 0.0, False, 0
    while rounds < _ROUNDS or (not steady and now() - start < protocol.warm_s):
        before = now()
        try:
            load = _loaded(target, short, f"{protocol.seed} warm-up {rounds}")
        except BenchError as error:
            return {"rounds": rounds, "steady": False, "error": str(error)}
        took = (now() - before) / max(1, len(load.records))
        steady = rounds > 0 and abs(took - last) <= _STEADY * took
        last, rounds = took, rounds + 1
    return {"rounds": rounds, "steady": steady}


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
