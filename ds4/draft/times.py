"""How long steps of some shapes take: measured, and told for other shapes from these."""

from collections import Counter, deque
from collections.abc import Callable
from math import sqrt
from statistics import fmean, median, stdev

Kind = tuple[int, int]  # sequences in a step, and a bound on their lengths
WARM = 2  # first times of a shape, which compile and record where that was not done before
RECENT = 48  # of which the mean counts: where experts must be fetched, steps differ by half
LEAST = 3  # from which it is believed
EXACT = 0.05  # error of a mean that is good enough
SLOW = 2.0  # times the median: more is a moment in which something else was slow


class Times:
    """Seconds by kind and size.

    slope  kind, size -> how the time grows with the size, in any unit, as far as that is known
           beforehand. What was measured says how much that is in seconds.
    """

    def __init__(self, slope: Callable[[Kind, int], float]) -> None:
        self._slope = slope
        self._seen: Counter[tuple[Kind, int]] = Counter()
        self._recent: dict[tuple[Kind, int], deque[float]] = {}
        self.means: dict[Kind, dict[int, float]] = {}  # of each kind, by size

    def add(self, kind: Kind, size: int, seconds: float) -> float:
        """What a step took; returns what of it was the shape's, and no slow moment's."""
        shape, told = (kind, size), self.seconds(kind, size)
        self._seen[shape] += 1
        if self._seen[shape] <= WARM and seconds >= SLOW * told:
            return told
        recent = self._recent.setdefault(shape, deque(maxlen=RECENT))
        recent.append(seconds)
        if len(recent) >= LEAST:
            most = SLOW * median(recent)
            self.means.setdefault(kind, {})[size] = fmean(min(one, most) for one in recent)
        return min(seconds, SLOW * told) if told else seconds

    def known(self, kind: Kind, size: int) -> bool:
        """Whether a shape was seen often enough, its first times left out."""
        return size in self.means.get(kind, {})

    def sure(self, kind: Kind, size: int) -> bool:
        """Whether it was seen so often that the mean is a twentieth off at most, or for long."""
        recent = self._recent.get((kind, size), ())
        if len(recent) < LEAST or 2 * len(recent) >= RECENT:
            return len(recent) >= LEAST
        return stdev(recent) <= EXACT * fmean(recent) * sqrt(len(recent))

    def seconds(self, kind: Kind, size: int) -> float:
        """Of a shape; of one not known yet, by those that are; 0 if none is."""
        known = self.means.get(kind)
        if not known:
            return 0.0
        if size in known:
            return known[size]
        first, lower = min(known), max((n for n in known if n < size), default=None)
        if lower is None:
            return known[first] * self._slope(kind, size) / self._slope(kind, first)
        upper = min((n for n in known if n > size), default=lower)
        start, end = (lower, upper) if upper > lower else (first, lower)
        unit = known[lower] / self._slope(kind, lower)
        if end > start:
            more = self._slope(kind, end) - self._slope(kind, start)
            unit = max(0.0, (known[end] - known[start]) / more)
        return known[lower] + unit * (self._slope(kind, size) - self._slope(kind, lower))

    def least(self, kind: Kind, size: int) -> float:
        """What a shape takes at least, if larger ones take no less; 0 if that is not known."""
        return max((s for n, s in self.means.get(kind, {}).items() if n <= size), default=0.0)
