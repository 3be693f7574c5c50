"""Guesses that could be made in a step, and what they promise."""

from dataclasses import dataclass


@dataclass
class Plan:
    """Guesses for each sequence, and what they promise."""

    counts: list[int]
    tokens: float
    made: float = 0.0  # guesses, where look-up finds some as often as it does
    none: float = 1.0  # how likely nobody finds any
    deepest: int = 0
    speed: float = 0.0  # tokens a second

    def add(self, worth: float, number: int, found: float) -> None:
        """One guess more of a sequence."""
        if self.counts[number] == 0:
            self.none *= 1 - found
        self.counts[number] += 1
        self.deepest = max(self.deepest, self.counts[number])
        self.tokens += worth
        self.made += found
