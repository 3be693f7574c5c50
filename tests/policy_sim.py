"""Texts in simulated time, whose guesses are right by chance."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import fmean

import numpy as np

from ds4.draft.policy import Policy, Record

STRETCH, MIXED = 64, (0.9, 0.2, 0.7, 0.5, 0.0)
SWITCH = 0.1  # of a plain step, what the first of some plain ones takes more
STALL, STALLS = 4.0, 0.002  # times and how often, a step is slow that has no reason to be
Chance = Callable[[int], float]  # tokens made -> how likely the next guess is right


def always(chance: float) -> Chance:
    return lambda made: chance


def mixed(made: int) -> float:
    return MIXED[made // STRETCH % len(MIXED)]


@dataclass(frozen=True)
class Machine:
    """Milliseconds of a step of 1, 2 ... rows for each sequence, and of 0, 1 ... guesses.

    noise  standard deviation of what a token costs, of its mean: its experts are here or not
    """

    steps: Sequence[float]
    drafts: Sequence[float] = (0.0,) * 6
    noise: float = 0.0

    @property
    def longest(self) -> int:
        return len(self.drafts) - 1

    def round_ms(self, guesses: float) -> float:
        """With so many guesses of each sequence, on average."""
        return float(np.interp(guesses, range(len(self.steps)), self.steps))

    def factors(self, tokens: int, seed: int) -> np.ndarray:
        """What each token of a text costs, of what it does on average."""
        rng = np.random.default_rng(10_000 + seed)
        each = np.maximum(0.3, rng.normal(1, self.noise, tokens + self.longest + 1))
        each[rng.random(len(each)) < STALLS] *= STALL
        return each if self.noise else np.ones(len(each))


def text_ms(
    machine: Machine, policy: Policy | int, chance: Chance, tokens: int, seed: int
) -> float:
    """Of a token of one text, by a policy or with always as many guesses.

    Equal seeds have equal texts. The luck of guesses does not count, that of steps does.
    """
    rng, factors = np.random.default_rng(seed), machine.factors(tokens, seed)
    record = policy.record() if isinstance(policy, Policy) else Record([])
    done, brought, total, plain_before = 0, 0.0, 0.0, False
    longest, foreseen = [machine.longest], None
    while done < tokens:
        if isinstance(policy, int):
            count = policy
        else:
            (count,) = foreseen or policy.lengths([record], longest)
            foreseen = policy.foresee([record], longest) if count else None
        right, likely = 0, chance(done)
        while right < count and rng.random() < likely:
            right += 1
        step = machine.steps[count] * factors[done : done + count + 1].mean()
        draft = machine.drafts[count]
        total += step + draft
        brought += sum(likely**n for n in range(count + 1))
        if isinstance(policy, Policy) and (count or plain_before):
            policy.learn([record], [count], [count], [right], draft / 1e3, step / 1e3)
        elif isinstance(policy, Policy):
            total += SWITCH * step  # and nobody knows when it began
        plain_before, done = not count, done + right + 1
    return total / brought


def best_ms(machine: Machine, chance: Chance, tokens: int, seed: int) -> float:
    """Of a token, with the best fixed length."""
    return min(text_ms(machine, n, chance, tokens, seed) for n in range(machine.longest + 1))


def batch_speed(
    machine: Machine, policy: Policy, chances: Sequence[float], tokens: int, seed: int
) -> float:
    """Tokens a second of some sequences that step together until each has made `tokens`."""
    rng, records = np.random.default_rng(seed), [policy.record() for _ in chances]
    made, total, brought = [0] * len(chances), 0.0, 0.0
    while min(made) < tokens:
        counts = policy.lengths(records, [machine.longest] * len(chances))
        right = [0] * len(chances)
        for number, (count, chance) in enumerate(zip(counts, chances, strict=True)):
            while right[number] < count and rng.random() < chance:
                right[number] += 1
            made[number] += right[number] + 1
            brought += sum(chance**n for n in range(count + 1))
        step = machine.round_ms(max(counts) if policy.alike else fmean(counts))
        draft = machine.drafts[max(counts)]
        policy.learn(records, counts, counts, right, draft / 1e3, step / 1e3)
        total += step + draft
    return 1e3 * brought / total


def best_batch_speed(machine: Machine, chances: Sequence[float]) -> tuple[float, float]:
    """Without guesses, and with the best length that is the same for all."""
    each = [
        1e3
        * sum(sum(chance**n for n in range(count + 1)) for chance in chances)
        / (machine.steps[count] + machine.drafts[count])
        for count in range(machine.longest + 1)
    ]
    return each[0], max(each)
