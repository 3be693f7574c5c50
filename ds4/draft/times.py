"""How long steps of some shapes take: measured, and told for other shapes from these."""

from bisect import bisect_left, insort
from collections import Counter, deque
from collections.abc import Callable
from math import sqrt
from statistics import fmean, median, stdev

Kind = tuple[int, int]  # sequences in a step, and a bound on their lengths
WARM = 2  # first times of a shape, which compile and record where that was not done before
RECENT = 96  # of which the mean counts: where experts must be fetched, steps differ by half
SELDOM = 8  # times of a shape seen so often, after which its mean is taken again
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
        self._exact: set[tuple[Kind, int]] = set()
        self._sizes: dict[Kind, list[int]] = {}  # that are known, in order
        self.means: dict[Kind, dict[int, float]] = {}  # of each kind, by size

    def add(self, kind: Kind, size: int, seconds: float) -> float:
        """What a step took; returns what of it was the shape's, and no slow moment's."""
        shape, told = (kind, size), self.seconds(kind, size)
        self._seen[shape] += 1
        if self._seen[shape] <= WARM and seconds >= SLOW * told:
            return told
        recent = self._recent.setdefault(shape, deque(maxlen=RECENT))
        recent.append(seconds)
        if len(recent) >= LEAST and (len(recent) < RECENT or self._seen[shape] % SELDOM == 0):
            self._learn(shape, recent)
        return min(seconds, SLOW * told) if told else seconds

    def _learn(self, shape: tuple[Kind, int], recent: deque[float]) -> None:
        (kind, size), most = shape, SLOW * median(recent)
        if not self.known(kind, size):
            insort(self._sizes.setdefault(kind, []), size)
        mean = fmean(min(one, most) for one in recent)
        self.means.setdefault(kind, {})[size] = mean
        if 2 * len(recent) >= RECENT or stdev(recent) <= EXACT * mean * sqrt(len(recent)):
            self._exact.add(shape)

    def known(self, kind: Kind, size: int) -> bool:
        """Whether a shape was seen often enough, its first times left out."""
        return size in self.means.get(kind, {})

    def timed(self, kind: Kind) -> int:
        """How many sizes are known."""
        return len(self._sizes.get(kind, ()))

    def largest(self, kind: Kind) -> int:
        """Of these."""
        return max(self._sizes.get(kind, ()), default=0)

    def exact(self, kind: Kind, size: int) -> bool:
        """Whether it was seen so often that the mean is a twentieth off at most, or for long."""
        return (kind, size) in self._exact

    def seconds(self, kind: Kind, size: int) -> float:
        """Of a shape; of one not known yet, by those that are; 0 if none is."""
        known = self.means.get(kind)
        if not known:
            return 0.0
        if size in known:
            return known[size]
        sizes, slope = self._sizes[kind], self._slope
        if size < sizes[0]:
            return known[sizes[0]] * slope(kind, size) / slope(kind, sizes[0])
        at = bisect_left(sizes, size)
        lower = sizes[at - 1]
        start, end = (lower, sizes[at]) if at < len(sizes) else (sizes[0], lower)
        rows = slope(kind, size) - slope(kind, lower)
        unit = known[lower] / slope(kind, lower)
        if end > start:
            more = slope(kind, end) - slope(kind, start)
            if more <= 0:  # chance has made it flat
                more, rows = end - start, size - lower
            unit = max(0.0, (known[end] - known[start]) / more)
        return known[lower] + unit * max(0.0, rows)

    def least(self, kind: Kind, size: int) -> float:
        """What a shape takes at least, if larger ones take no less; 0 if that is not known."""
        return max((s for n, s in self.means.get(kind, {}).items() if n <= size), default=0.0)
