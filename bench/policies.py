"""Policies that make guesses whether they pay or not, to see what comes of them."""

from collections import Counter
from collections.abc import Sequence

import numpy as np

from ds4.draft.policy import Policy, Record


class Always(Policy):
    def lengths(self, records: Sequence[Record], most: Sequence[int]) -> list[int]:
        return [min(self.longest, count) for count in most]


class Restless(Policy):
    """Lengths at random, whatever pays, and any number of guesses kept: shapes of all kinds."""

    rng = np.random.default_rng(0)

    def lengths(self, records: Sequence[Record], most: Sequence[int]) -> list[int]:
        return [int(self.rng.integers(min(self.longest, count) + 1)) for count in most]

    def kept(self, asked: Sequence[int], sure: Sequence[Sequence[float]]) -> list[int]:
        return [int(self.rng.integers(count + 1)) for count in asked]


class Counted(Policy):
    """A policy that notes how often guesses of each position were made, and how often right."""

    def __init__(self, inner: Policy) -> None:
        super().__init__(inner.longest)
        self.inner, self.made, self.right_at = inner, Counter[int](), Counter[int]()
        self.rounds = 0  # and plain steps

    def made_at(self) -> list[int]:
        """Guesses at each place."""
        return [self.made[n] for n in range(1, self.longest + 1)]

    def lengths(self, records: Sequence[Record], most: Sequence[int]) -> list[int]:
        return self.inner.lengths(records, most)

    def learn(
        self,
        records: Sequence[Record],
        asked: Sequence[int],
        guesses: Sequence[int],
        accepted: Sequence[int],
        draft_s: float,
        step_s: float,
    ) -> None:
        self.rounds += 1
        for guessed, right in zip(guesses, accepted, strict=True):
            self.made.update(range(1, guessed + 1))
            self.right_at.update(range(1, right + 1))
        self.inner.learn(records, asked, guesses, accepted, draft_s, step_s)
