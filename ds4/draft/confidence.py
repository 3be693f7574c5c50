"""What a drafter's own confidence is worth: right as often as such guesses were before.

DSpark says of each guess how likely it is to be right, and is too sure of itself. So its word is
sorted into bins by place and size, and believed as far as the bins' trials bear it out.
"""

from collections.abc import Sequence

BINS = 12
PRIOR = 12.0  # trials that a drafter's word counts for
KEEP = 0.998  # of a bin's trials, at the next one: what was long ago counts less


class Calibration:
    """Chances of guesses at `places` places, as they were seen to be."""

    def __init__(self, places: int) -> None:
        self._trials = [[0.0] * BINS for _ in range(places)]
        self._right = [[0.0] * BINS for _ in range(places)]

    def chance(self, place: int, said: float) -> float:
        """That a guess is right of which the drafter said this, if those before it are."""
        trials, right = self._trials[place][_bin(said)], self._right[place][_bin(said)]
        return (right + PRIOR * said) / (trials + PRIOR)

    def learn(self, said: Sequence[float], guessed: int, accepted: int) -> None:
        """Of a draft, `guessed` places were verified, and so many were right."""
        for place in range(min(accepted + 1, guessed)):
            number = _bin(said[place])
            trials, right = self._trials[place], self._right[place]
            trials[number] = KEEP * trials[number] + 1
            right[number] = KEEP * right[number] + (place < accepted)


def _bin(said: float) -> int:
    return min(int(said * BINS), BINS - 1)
