"""How long steps of some shapes take: measured, and told for other shapes from these."""

from collections import Counter, deque
from collections.abc import Callable, Hashable
from statistics import median

WARM = 2  # first times of a shape, which compile and record
RECENT = 5  # of which the median counts
LEAST = 3  # from which one is believed: one slow moment must not end all guessing


class Times:
    """Seconds by kind and size. `more` tells what a larger size costs where nothing else does."""

    def __init__(self, more: Callable[[int], float] | None = None) -> None:
        self._more = more
        self._seen: Counter[tuple[Hashable, int]] = Counter()
        self._recent: dict[tuple[Hashable, int], deque[float]] = {}
        self._medians: dict[Hashable, dict[int, float]] = {}  # of each kind, by size

    def add(self, kind: Hashable, size: int, seconds: float) -> None:
        shape = kind, size
        self._seen[shape] += 1
        if self._seen[shape] > WARM:
            recent = self._recent.setdefault(shape, deque(maxlen=RECENT))
            recent.append(seconds)
            if len(recent) >= LEAST:
                self._medians.setdefault(kind, {})[size] = median(recent)

    def known(self, kind: Hashable, size: int, often: int = LEAST) -> bool:
        """Whether a shape was seen so often, its first times left out."""
        return len(self._recent.get((kind, size), ())) >= often

    def seconds(self, kind: Hashable, size: int) -> float:
        """Of a shape; of one not known yet, between its neighbours', or from the next smaller one.

        That is too little for the largest ones, so they are tried.
        """
        known = self._medians.get(kind, {})
        if size in known:
            return known[size]
        lower = max((n for n in known if n <= size), default=None)
        upper = min((n for n in known if n >= size), default=None)
        if lower is None:
            return known[upper] * size / upper if upper else 0.0
        if upper is None:
            more = self._more(size) - self._more(lower) if self._more else 0.0
            return known[lower] + more
        return known[lower] + (size - lower) / (upper - lower) * (known[upper] - known[lower])
