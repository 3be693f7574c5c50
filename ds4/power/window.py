"""The energy between two moments, from what a source said around them, and if it is valid."""

import bisect
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Literal

from .source import PowerSource, Reading, Scope

MAX_GAP_S = 3.0  # between two samples
MIN_SAMPLES = 3  # inside a window
MIN_REFRESHES = 10  # of the device's own value in a window: its edges are known to one
DISAGREEMENT = 0.05  # of the counter, between it and the integral


@dataclass
class Trace:
    """All that one source said: (seconds, watts, joules since the first), absent values NaN.

    `faults` are (seconds, what went wrong): a reading that failed or cannot be.
    """

    name: str
    scope: Scope
    part: str
    refresh_s: float
    wrap_j: float | None = None
    samples: list[tuple[float, float, float]] = field(default_factory=list)
    faults: list[tuple[float, str]] = field(default_factory=list)
    _raw: float | None = None  # the counter as it was last read
    _turns: float = 0.0  # joules to add for the times that it wrapped

    @classmethod
    def of(cls, source: PowerSource) -> "Trace":
        return cls(source.name, source.scope, source.part, source.refresh_s, source.wrap_j)

    def add(self, when: float, reading: Reading) -> None:
        """Keep a reading; what cannot be is kept as a fault."""
        if self.samples and when <= self.samples[-1][0]:
            self.faults.append((when, "the clock did not go forward"))
            return
        watts = math.nan if reading.watts is None else reading.watts
        if reading.watts is not None and not 0 <= watts < math.inf:
            self.faults.append((when, f"read {watts} W"))
            watts = math.nan
        joules = math.nan if reading.joules is None else self._unwrapped(when, reading.joules)
        if not (math.isnan(watts) and math.isnan(joules)):
            self.samples.append((when, watts, joules))

    def _unwrapped(self, when: float, raw: float) -> float:
        if not 0 <= raw < math.inf:
            self.faults.append((when, f"counted {raw} J"))
            return math.nan
        if self._raw is not None and raw < self._raw:
            if self.wrap_j is not None and self._raw > self.wrap_j / 2 > raw:
                self._turns += self.wrap_j
            else:
                self.faults.append((when, "the counter went back"))
                self._turns += self._raw - raw
        self._raw = raw
        return self._turns + raw


@dataclass(frozen=True)
class Energy:
    """Of one source in one window. `problems` say why it is not valid; joules may be missing."""

    source: str
    scope: Scope
    part: str
    seconds: float
    joules: float | None
    method: Literal["counter", "integral"] | None
    counter_j: float | None
    integral_j: float | None
    samples: int
    problems: tuple[str, ...] = ()

    @property
    def valid(self) -> bool:
        return not self.problems and self.joules is not None

    @property
    def watts(self) -> float | None:
        """The mean."""
        return None if self.joules is None else self.joules / self.seconds


def energy(trace: Trace, start: float, end: float) -> Energy:
    """Of `trace` from `start` to `end`, in the sampler's seconds; the counter is preferred."""
    if not end > start:
        raise ValueError(f"a window ends after it starts, not {start} to {end}")
    integral = _integral([(t, w) for t, w, _ in trace.samples if not math.isnan(w)], start, end)
    counter = _advance([(t, j) for t, _, j in trace.samples if not math.isnan(j)], start, end)
    best = integral if counter is None else counter
    times = [t for t, _, _ in trace.samples]
    inside = bisect.bisect_right(times, end) - bisect.bisect_left(times, start)
    return Energy(
        trace.name,
        trace.scope,
        trace.part,
        end - start,
        best,
        None if best is None else "integral" if counter is None else "counter",
        counter,
        integral,
        inside,
        tuple(_problems(trace, times, inside, start, end, counter, integral)),
    )


def _problems(
    trace: Trace,
    times: Sequence[float],
    inside: int,
    start: float,
    end: float,
    counter: float | None,
    integral: float | None,
) -> Iterable[str]:
    name = trace.name
    if not times:
        yield f"{name}: the device is missing, it gave no reading"
        return
    if times[0] > start or times[-1] < end:
        yield f"{name}: the readings do not cover the window"
    if inside < MIN_SAMPLES:
        yield f"{name}: {inside} readings in the window, {MIN_SAMPLES} are needed"
    elif end - start < MIN_REFRESHES * trace.refresh_s:
        yield (
            f"{name}: the window has {end - start:.2g} s, and a value of {trace.refresh_s:g} s "
            f"needs {MIN_REFRESHES * trace.refresh_s:g}"
        )
    near = times[max(0, bisect.bisect_right(times, start) - 1) : bisect.bisect_left(times, end) + 1]
    widest = max((b - a for a, b in pairwise(near)), default=0.0)
    if widest > MAX_GAP_S:
        yield f"{name}: no reading for {widest:.1f} s, {MAX_GAP_S:g} at most"
    faults = [what for when, what in trace.faults if start <= when <= end]
    if faults:
        yield f"{name}: {faults[0]}" + (f" ({len(faults)} times)" if len(faults) > 1 else "")
    if counter is not None and integral is not None:
        apart = abs(counter - integral) / max(counter, integral, 1e-9)
        if apart > DISAGREEMENT:
            yield f"{name}: counter {counter:.1f} J, integrated power {integral:.1f} J"


def _integral(points: list[tuple[float, float]], start: float, end: float) -> float | None:
    """Trapezoid over (seconds, watts), its edges interpolated; None if they are not covered."""
    edges = _at(points, start), _at(points, end)
    if edges[0] is None or edges[1] is None:
        return None
    within = [point for point in points if start < point[0] < end]
    line = [(start, edges[0]), *within, (end, edges[1])]
    return sum((b[0] - a[0]) * (a[1] + b[1]) / 2 for a, b in pairwise(line))


def _advance(points: list[tuple[float, float]], start: float, end: float) -> float | None:
    """How far a counter went."""
    first, last = _at(points, start), _at(points, end)
    return None if first is None or last is None else last - first


def _at(points: list[tuple[float, float]], when: float) -> float | None:
    """The value at a moment, on the line between its neighbours."""
    after = bisect.bisect_left(points, (when, -math.inf))
    if after < len(points) and points[after][0] == when:
        return points[after][1]
    if not 0 < after < len(points):
        return None
    (t0, v0), (t1, v1) = points[after - 1], points[after]
    return v0 + (v1 - v0) * (when - t0) / (t1 - t0)


@dataclass(frozen=True)
class Total:
    """All sources of one scope in one window."""

    scope: str  # a Scope, or "estimated wall"
    covers: str  # the parts that were measured: "gpu", "cpu+gpu", "system"
    seconds: float
    joules: float | None
    problems: tuple[str, ...] = ()

    @property
    def valid(self) -> bool:
        return not self.problems and self.joules is not None


def total(energies: Iterable[Energy], scope: Scope) -> Total | None:
    """The sum over a scope; None without a source. One source's problem is the sum's."""
    chosen = [one for one in energies if one.scope == scope]
    if not chosen:
        return None
    parts = [one.joules for one in chosen if one.joules is not None]
    return Total(
        scope,
        "+".join(sorted({one.part for one in chosen})),
        chosen[0].seconds,
        math.fsum(parts) if len(parts) == len(chosen) else None,
        tuple(problem for one in chosen for problem in one.problems),
    )
