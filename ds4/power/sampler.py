"""One thread that reads every source, each at its own pace, on one monotonic clock."""

import threading
import time
from collections.abc import Callable, Sequence

from ..errors import PowerError
from .source import PowerSource
from .window import Energy, Trace, energy

SLOW_S = 1.0  # a reading that took longer belongs to no moment

now = time.perf_counter  # the clock of every window and of every token


class Sampler:
    """Reads `sources` until it is stopped. Windows are asked for afterwards, or while it runs.

    with Sampler(sources) as sampler:
        start = now(); work(); end = now()
    energies = sampler.energies(start, end)
    """

    def __init__(
        self, sources: Sequence[PowerSource], clock: Callable[[], float] = now, tail_s: float = 0.2
    ) -> None:
        self.sources = list(sources)
        self.traces = [Trace.of(source) for source in self.sources]
        self.tail_s = tail_s  # how long it goes on when it is stopped: windows must be covered
        self._clock = clock
        self._due = [clock()] * len(self.sources)
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def poll(self) -> float:
        """Read what is due; the seconds until something is due again."""
        for i, source in enumerate(self.sources):
            before = self._clock()
            if before < self._due[i]:
                continue
            self._read(source, self.traces[i], before)
            missed = (self._clock() - self._due[i]) // source.interval_s
            self._due[i] += (max(0.0, missed) + 1) * source.interval_s
        return max(0.0, min(self._due, default=3600.0) - self._clock())

    def _read(self, source: PowerSource, trace: Trace, before: float) -> None:
        try:
            reading = source.read()
        except (OSError, PowerError) as error:
            trace.faults.append((before, f"no reading: {error}"))
            return
        after = self._clock()
        if after - before > SLOW_S:
            trace.faults.append((before, f"a reading took {after - before:.1f} s"))
            return
        trace.add((before + after) / 2, reading)

    def energies(self, start: float, end: float) -> list[Energy]:
        """Of every source, from `start` to `end` in `now()`'s seconds."""
        return [energy(trace, start, end) for trace in self.traces]

    def __enter__(self) -> "Sampler":
        if self.sources:
            self._thread = threading.Thread(target=self._run, name="power", daemon=True)
            self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        if self._thread is not None:
            wait = max(source.interval_s for source in self.sources) + self.tail_s
            time.sleep(0.0 if error[0] is not None else wait)
            self._stop.set()
            self._thread.join(timeout=10)
        for source in self.sources:
            source.close()

    def _run(self) -> None:
        while not self._stop.is_set():
            self._stop.wait(min(self.poll(), 0.5))
