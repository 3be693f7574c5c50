"""What a drafter's own confidence is worth: right as often as such guesses were before.

DSpark says of each guess how likely it is to be right, and is too sure of itself. So its word is
sorted into bins by place and size, and believed as far as the bins' trials bear it out; and only
where that foretells better than the past does: a drafter that says too little of guesses which are
right would else never see them verified.
"""

from collections.abc import Sequence

BINS = 12
PRIOR = 12.0  # trials that a drafter's word counts for
KEEP = 0.998  # of a bin's trials, at the next one: what was long ago counts less
EDGE = 0.01  # of squared error, by which it must foretell better to be believed
EDGE_PACE = 1 / 64  # of how well the drafter's word foretells, how much the next guess replaces


class Calibration:
    """Chances of guesses at `places` places, as they were seen to be."""

    def __init__(self, places: int) -> None:
        self._trials = [[0.0] * BINS for _ in range(places)]
        self._right = [[0.0] * BINS for _ in range(places)]
        self._edge = 0.0  # squared error of the past less that of the drafter's word, of late

    def chance(self, place: int, said: float) -> float:
        """That a guess is right of which the drafter said this, if those before it are."""
        trials, right = self._trials[place][_bin(said)], self._right[place][_bin(said)]
        return (right + PRIOR * said) / (trials + PRIOR)

    @property
    def trusted(self) -> bool:
        """Whether the drafter's word says more of its guesses than what came of those before."""
        return self._edge > EDGE

    def learn(
        self, said: Sequence[float], guessed: int, accepted: int, past: Sequence[float]
    ) -> None:
        """Of a draft, `guessed` places were verified, and so many were right.

        `past` is how likely that was of each by those before, its draft not counted.
        """
        for place in range(min(accepted + 1, guessed)):
            was, told = float(place < accepted), self.chance(place, said[place])
            edge = (past[place] - was) ** 2 - (told - was) ** 2
            self._edge += EDGE_PACE * (edge - self._edge)
            number = _bin(said[place])
            trials, right = self._trials[place], self._right[place]
            trials[number] = KEEP * trials[number] + 1
            right[number] = KEEP * right[number] + was


def _bin(said: float) -> int:
    return min(int(said * BINS), BINS - 1)
