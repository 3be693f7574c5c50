"""Power while the server runs: watts now, joules so far, and a request's share of them."""

import bisect
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from ..engine.api import Finished

if TYPE_CHECKING:
    from ..power.source import PowerSource

PERIOD_S = 1.0
KEPT = 6 * 3600  # readings: a request that runs longer is told nothing


class Watts:
    """Reads sources once a second in a thread. A collector for a registry.

    sources  of ds4.power; their domain is the part of the machine, or "wall" before its supply
    running  how many requests share the power now
    """

    def __init__(self, sources: Sequence["PowerSource"], running: Callable[[], int]) -> None:
        self._sources, self._running = list(sources), running
        self._last: dict[str, tuple[float, float | None, float]] = {}  # time, counter, watts
        self._joules: dict[str, float] = {}
        self._shares: deque[tuple[float, float]] = deque(maxlen=KEPT)
        self._share = 0.0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="ds4-watts", daemon=True)

    def __enter__(self) -> "Watts":
        if self._sources:
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        if self._sources:
            self._thread.join(timeout=10)
        for source in self._sources:
            source.close()

    def _run(self) -> None:
        while not self._stop.is_set():
            self.poll(time.monotonic())
            self._stop.wait(PERIOD_S)

    def poll(self, now: float) -> None:
        """Read every source."""
        spent = {source.name: self._read(source, now) for source in self._sources}
        whole = self._widest()
        used = sum(joules for name, joules in spent.items() if name in whole)
        self._share += used / max(1, self._running())
        self._shares.append((now, self._share))

    def _read(self, source: "PowerSource", now: float) -> float:
        """Joules since the last reading."""
        try:
            reading = source.read()
        except Exception:  # a meter that fails is no reason to serve nobody
            self._last.pop(source.name, None)
            return 0.0
        before, counter, watts = self._last.get(source.name, (now, reading.joules, 0.0))
        spent = 0.0
        if reading.joules is not None and counter is not None:
            spent = reading.joules - counter
            if spent < 0:
                spent += source.wrap_j or -spent
        elif reading.watts is not None:
            spent = (now - before) * (reading.watts + watts) / 2
        drawn = reading.watts
        if drawn is None:
            drawn = spent / (now - before) if now > before else 0.0
        self._last[source.name] = (now, reading.joules, drawn)
        self._joules[source.name] = self._joules.get(source.name, 0.0) + spent
        return spent

    def _widest(self) -> set[str]:
        """The sources that together cover most of the machine, each joule once."""
        scopes = {source.name: source.scope for source in self._sources}
        for scope in ("wall", "dc-system", "chip"):
            names = {name for name, its in scopes.items() if its == scope}
            if names:
                return names
        return set()

    def share(self, finished: Finished) -> Mapping[str, float]:
        """A request's joules: power by time, divided among the requests of each second."""
        now = time.monotonic()
        shares = list(self._shares)
        start = now - finished.prefill_s - finished.decode_s
        if len(shares) < 2 or start < shares[0][0]:
            return {}
        return {"joules": round(_at(shares, now) - _at(shares, start), 3)}

    def describe(self) -> Iterator[Metric]:
        """Nothing in advance: names come with the figures."""
        return iter(())

    def collect(self) -> Iterator[Metric]:
        watts = GaugeMetricFamily("ds4_power_watts", "Drawn now.", labels=["domain", "source"])
        joules = CounterMetricFamily("ds4_energy_joules", "Used.", labels=["domain", "source"])
        for source in self._sources:
            domain = "wall" if source.scope == "wall" else source.part
            if source.name in self._last:
                watts.add_metric([domain, source.name], self._last[source.name][2])
            joules.add_metric([domain, source.name], self._joules.get(source.name, 0.0))
        yield watts
        yield joules


def _at(shares: list[tuple[float, float]], moment: float) -> float:
    """The sum at a moment between two readings, or after the last, as fast as before it."""
    n = min(max(1, bisect.bisect(shares, (moment,))), len(shares) - 1)
    (t0, s0), (t1, s1) = shares[n - 1], shares[n]
    return s0 + (s1 - s0) * (moment - t0) / (t1 - t0)


def open_watts(specs: Sequence[str], running: Callable[[], int]) -> Watts:
    """Of the sources that are named; see ds4.power. Raises PowerError for one that is not there."""
    from ..power.opening import open_sources

    return Watts(open_sources(specs).live, running)
