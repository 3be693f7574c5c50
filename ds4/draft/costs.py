"""What rounds of guesses cost beside plain steps: by what was timed, or by what to expect of rows.

A step's time depends on its rows, a draft's on its length. Until it was timed a row more for each
sequence is expected to take ROW of a plain step, and where experts lie in host memory to fetch
those that it adds; then as much as the lengths that were timed tell.
"""

from collections.abc import Callable

from .times import Kind, Times

ROW = 0.35  # of a plain step
DRAFT = 0.25  # of a plain step, what the first draft is thought to take, which may have compiled
HOPEFUL = 0.8  # of the time that is told for a length never timed, what it could take


class Costs:
    """Seconds of steps and drafts, for so many sequences and texts of some span.

    alike   whether all sequences of a step get the rows of the longest guess
    misses  rows of a step -> seconds that experts in host memory take
    span    a bound on the longest text now: steps of longer ones take longer
    """

    def __init__(self, alike: bool, misses: Callable[[int], float] | None) -> None:
        self.alike, self.misses, self.span = alike, misses, 0
        self.steps = Times(self._slope)
        self.drafts = Times(lambda _, count: 1 + count)
        self.empty = Times(lambda _, rows: rows)  # steps for which no guess was found
        self._curves = dict[int, Kind]()  # of each batch, the span of which most was timed

    def known(self, batch: int) -> bool:
        """Whether it is known what guesses have to beat."""
        return self.steps.exact((batch, self.span), batch)

    def plain(self, batch: int) -> float:
        """Of a plain step: at most what one takes in which nothing was found to guess."""
        kind = batch, self.span
        seconds = self.steps.seconds(kind, batch)
        if self.empty.known(kind, batch):
            seconds = min(seconds, self.empty.seconds(kind, batch))
        return seconds

    def reach(self, batch: int) -> int:
        """Guesses of a sequence that may be tried: one, later twice as many as ever were timed."""
        kind = batch, self.span
        if not self.drafts.timed((batch, 0)):
            return 1
        return max(1, 2 * (self.steps.largest(self._curves.get(batch, kind)) // batch - 1))

    def row(self, batch: int, place: int, longest: int) -> float:
        """Of a sequence's row at a place: the least, if some more make it cheaper."""
        kind, rows = (batch, self.span), [batch * (1 + n) for n in range(place, longest + 1)]
        first, *more = [self.steps.seconds(kind, count) for count in rows]
        each = [(later - first) / n / batch for n, later in enumerate(more, 1)]
        return max(0.0, min(each))

    def draft(self, batch: int, count: int, hopeful: bool = False) -> float:
        return self._told(self.drafts, (batch, 0), count, hopeful)

    def step(self, batch: int, guesses: int, hopeful: bool = False) -> float:
        """Of a step with guesses, one row each beside those of a plain one."""
        return self._told(self.steps, (batch, self.span), batch + guesses, hopeful)

    def no_guess(self, batch: int) -> float:
        """Of a round in which there was nothing to guess."""
        kind = batch, self.span
        times = self.empty if self.empty.known(kind, batch) else self.steps
        return times.seconds(kind, batch)

    def all_timed(self, batch: int, most: int) -> bool:
        """Whether the steps of all lengths are well known."""
        return all(self.exact(batch, n) for n in range(1, most + 1))

    def exact(self, batch: int, guesses: int) -> bool:
        """Whether the step with so many guesses of each is well known."""
        return self.steps.exact((batch, self.span), batch * (guesses + 1))

    def learn(
        self, batch: int, asked: int, guesses: int, longest: int, draft_s: float, step_s: float
    ) -> float:
        """What a round took; returns what of it will be so again."""
        kind, rows = (batch, self.span), batch + (batch * longest if self.alike else guesses)
        if asked and not guesses:
            return self.empty.add(kind, batch, draft_s + step_s)
        took = 0.0
        if asked:
            told = self.drafts.add((batch, 0), asked, draft_s)
            took = told or min(draft_s, DRAFT * self.plain(batch))
        took += self.steps.add(kind, rows, step_s)
        if self.steps.timed(kind) >= self.steps.timed(self._curves.get(batch, kind)):
            self._curves[batch] = kind
        return took

    def _told(self, times: Times, kind: Kind, size: int, hopeful: bool) -> float:
        seconds = times.seconds(kind, size)
        if hopeful and not times.exact(kind, size):
            return max(times.least(kind, size), HOPEFUL * seconds)
        return seconds

    def _slope(self, kind: Kind, rows: int) -> float:
        """Seconds of a step of so many rows, by those of a plain one."""
        batch, misses = kind[0], self.misses or (lambda rows: 0.0)
        if self._curves.get(batch, kind) != kind:  # texts of other lengths cost much the same
            return self.steps.seconds(self._curves[batch], rows)
        plain = self.steps.means.get(kind, {}).get(batch, 1.0)
        here = max(0.0, plain - misses(batch))
        return here * (1 + ROW * (rows / batch - 1)) + misses(rows)
