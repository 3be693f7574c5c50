"""How many tokens to guess: as many as pay, by what guesses and steps were seen to be and to cost.

Guessing k tokens costs their draft and a step of k + 1 rows, and brings 1 + a1 + ... + ak tokens,
ai being the share of times that the first i guesses were right. All of it is measured as text is
made. Where nothing pays, one round in many still guesses, so that better times are noticed: so few
that they cost a hundredth of all time at most.
"""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import median

HOPE = 0.7  # of a guess that was never tried
PACE = 1 / 24  # of what is believed of a guess, how much the next trial replaces
WARM = 2  # first times of a shape, which compile and record
LOSS = 0.01  # of all time, what trying may cost where guessing does not pay
FEWEST, MOST = 16, 2048  # plain steps between tries
BETTER = 1.01  # what guessing must promise over plain steps


@dataclass
class _Time:
    """Seconds of a step of some shape: the median of recent ones."""

    seen: int = 0
    recent: deque[float] = field(default_factory=lambda: deque(maxlen=9))

    def add(self, seconds: float) -> None:
        self.seen += 1
        if self.seen > WARM:
            self.recent.append(seconds)

    @property
    def known(self) -> bool:
        return bool(self.recent)

    @property
    def seconds(self) -> float:
        return median(self.recent)


class Policy:
    """Chooses for each number of sequences; `right` is what is believed of guesses 1, 2 ..."""

    def __init__(self, longest: int) -> None:
        self.longest = longest
        self.right = [HOPE] * longest
        self._steps: dict[tuple[int, int], _Time] = {}  # by sequences and guesses
        self._drafts: dict[tuple[int, int], _Time] = {}
        self._plain = 0  # steps since the last guess

    def length(self, batch: int) -> int:
        """How many tokens each of `batch` sequences should guess now."""
        if (batch, 0) not in self._steps or not self._steps[batch, 0].known:
            return 0
        speeds = [self.speed(batch, count) for count in range(self.longest + 1)]
        best = max(range(len(speeds)), key=speeds.__getitem__)
        if best and speeds[best] > BETTER * speeds[0]:
            return best
        return self._try(batch, speeds)

    def _try(self, batch: int, speeds: list[float]) -> int:
        """Where guessing does not pay: 0, or now and then the least bad length."""
        least = max(range(1, len(speeds)), key=speeds.__getitem__)
        lost = self._brings(least) * (speeds[0] / speeds[least] - 1)  # in tokens of plain steps
        gap = min(max(FEWEST, lost / LOSS), MOST)
        return least if self._plain >= gap else 0

    def speed(self, batch: int, count: int) -> float:
        """Tokens a second and sequence, expected of guessing `count` tokens."""
        seconds = _estimate(self._steps, batch, count) + _estimate(self._drafts, batch, count)
        return self._brings(count) / seconds

    def _brings(self, count: int) -> float:
        tokens, alive = 1.0, 1.0
        for right in self.right[:count]:
            alive *= right
            tokens += alive
        return tokens

    def learn(
        self, guesses: Sequence[int], accepted: Sequence[int], draft_s: float, step_s: float
    ) -> None:
        """What a round was: of each sequence how many it guessed and how many were right."""
        batch, longest = len(guesses), max(guesses)
        self._plain = 0 if longest else self._plain + 1
        self._steps.setdefault((batch, longest), _Time()).add(step_s)
        if longest:
            self._drafts.setdefault((batch, longest), _Time()).add(draft_s)
        for guessed, right in zip(guesses, accepted, strict=True):
            for place in range(min(right + 1, guessed)):
                self.right[place] += PACE * ((place < right) - self.right[place])
            if right == guessed and 0 < guessed < self.longest:  # one more might have been right
                hope = self.right[guessed - 1] - self.right[guessed]
                self.right[guessed] += PACE * max(0.0, hope)


def _estimate(times: dict[tuple[int, int], _Time], batch: int, count: int) -> float:
    """Seconds of a shape. Of one not known yet: between its neighbours', or the next smaller one's.

    That is too little for the largest ones, so they are tried.
    """
    known = {n: t.seconds for (b, n), t in times.items() if b == batch and t.known}
    lower = max((n for n in known if n <= count), default=None)
    upper = min((n for n in known if n >= count), default=None)
    if lower is None:
        return known[upper] * count / upper if upper else 0.0
    if upper is None or upper == lower:
        return known[lower]
    share = (count - lower) / (upper - lower)
    return known[lower] + share * (known[upper] - known[lower])
