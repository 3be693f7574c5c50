"""What is believed of one sequence's guesses, and what guessing may still lose it."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from statistics import fmean

HOPE = 0.7  # of a guess that was never tried
FEW = 8  # trials that what is believed beforehand counts for
PACE = 1 / 40  # of what is believed of a sequence's guess, how much the next trial replaces
COMMON = 1 / 96  # the same of what is believed of a sequence that has not begun
LEND = 1.5  # plain steps that guessing may lose a sequence before it has brought it any
KEPT = 8.0  # and at most later: what it brought long ago is not for it to lose


@dataclass
class Record:
    """Of one sequence.

    right  of guess 1, 2 ..., how likely it is if those before it are right
    found  how likely there are guesses at all: look-up has some in places only
    tried  trials of each; what was never tried is believed to be like the guess before it
    plain  steps since its last guess
    spare  plain steps that guessing may lose it now
    """

    right: list[float]
    found: float = 1.0
    tried: list[int] = field(default_factory=list)
    plain: int = 0
    spare: float = LEND

    def __post_init__(self) -> None:
        self.tried = self.tried or [0] * len(self.right)

    def worth(self, most: int) -> Iterator[float]:
        """Tokens that its first guess brings, its second ..."""
        alive = self.found
        for right in self.right[:most]:
            alive *= right
            yield alive

    def learn(self, guessed: int, accepted: int, pace: float) -> None:
        for place in range(min(accepted + 1, guessed)):
            self.tried[place] += 1
            self.correct(place, float(place < accepted), pace)
            for later in range(place + 1, len(self.right)):
                if not self.tried[later]:
                    self.right[later] = self.right[place]
        if accepted == guessed and 0 < guessed < len(self.right):  # one more might have been right
            hope = self.right[guessed - 1] - self.right[guessed]
            self.right[guessed] += pace * max(0.0, hope)

    def correct(self, place: int, right: float, pace: float) -> None:
        """One trial more: the first ones count most."""
        pace = max(pace, 1 / (FEW + self.tried[place]))
        self.right[place] += pace * (right - self.right[place])

    def earn(self, steps: float) -> None:
        """Guessing has brought so many plain steps, or lost them."""
        self.spare = min(self.spare + steps, KEPT)


def spare(records: Sequence[Record]) -> float:
    """Plain steps that guessing may lose sequences now, of each on average."""
    return fmean(record.spare for record in records)
