"""A drafter's own confidence: calibrated, and lengths by it, in simulated time."""

import numpy as np
import pytest

from ds4.draft.confidence import Calibration
from ds4.draft.policy import Policy

LONGEST = 5


def chances(rng: np.random.Generator) -> np.ndarray:
    """How likely a draft's guesses are: texts have easy and hard places."""
    return rng.beta(0.8, 0.5, LONGEST)


def boasting(chance: np.ndarray) -> np.ndarray:
    """What a drafter says that is too sure of itself."""
    return chance**0.5


def outcome(rng: np.random.Generator, chance: np.ndarray, count: int) -> int:
    right = 0
    while right < count and rng.random() < chance[right]:
        right += 1
    return right


def test_a_word_is_worth_what_came_of_it() -> None:
    rng, calibration = np.random.default_rng(0), Calibration(LONGEST)
    for _ in range(6000):
        chance = chances(rng)
        right = outcome(rng, chance, LONGEST)
        calibration.learn(boasting(chance).tolist(), LONGEST, right, [0.6] * LONGEST)
    assert calibration.trusted
    for place in (0, 2):
        told, true = [], []
        for _ in range(2000):
            chance = chances(rng)
            told.append(calibration.chance(place, float(boasting(chance)[place])))
            true.append(chance[place])
        assert np.mean(np.abs(np.array(told) - true)) < 0.06
        assert np.mean(told) == pytest.approx(np.mean(true), abs=0.03)
    assert Calibration(1).chance(0, 0.7) == pytest.approx(0.7)  # nothing is known better


def seconds_a_token(says: bool, longest: int | None = None) -> float:
    """With lengths by confidence, or without; or always `longest`."""
    rng, policy = np.random.default_rng(1), Policy(LONGEST)
    record, time, tokens = policy.record(), 0.0, 0
    for _ in range(4000):
        chance = chances(rng)
        sure = [boasting(chance).tolist()]
        asked = policy.lengths([record], [LONGEST]) if longest is None else [longest]
        made = policy.kept(asked, sure) if says and asked[0] else asked
        right = outcome(rng, chance, made[0])
        draft, step = 0.1 * (asked[0] > 0), 1 + 0.3 * made[0]
        if says and asked[0]:
            policy.learn_sure([record], sure, made, [right])
        policy.learn([record], asked, made, [right], draft, step)
        time, tokens = time + draft + step, tokens + right + 1
    return time / tokens


def test_lengths_by_confidence_beat_those_by_the_past() -> None:
    fixed = [seconds_a_token(False, count) for count in range(LONGEST + 1)]
    by_past, by_confidence = seconds_a_token(False), seconds_a_token(True)
    assert by_past < 1.05 * min(fixed)
    assert by_confidence < 0.93 * min(by_past, *fixed)


def test_kept_guesses_end_at_the_first_that_does_not_pay() -> None:
    policy = Policy(4)
    record = policy.record()
    for count in (0, 1, 2, 3, 4) * 5:
        policy.learn([record], [count], [count], [count], 0.0, 1 + 0.3 * count)
    record.right = [0.5] * 4
    assert policy.kept([4], [[0.05] * 4]) == [4]  # nobody knows yet what its word is worth
    policy.learn_sure([record], [[0.9] * 4], [4], [4])
    record.right = [0.9] * 4
    assert policy.lengths([record], [4]) == [4]
    assert policy.kept([4], [[0.9, 0.9, 0.9, 0.9]]) == [4]
    assert policy.kept([4], [[0.9, 0.1, 0.99, 0.99]]) == [1]
    assert policy.kept([4], [[0.05, 0.99, 0.99, 0.99]]) == [0]
    assert policy.kept([2, 0], [[0.9] * 4] * 2) == [2, 0]
    policy.alike = True  # one row more for one is one for both
    for count in (0, 1, 2, 3, 4) * 5:
        policy.learn([record] * 2, *[[count] * 2] * 3, 0.0, 1 + 0.3 * count)
    assert policy.kept([4, 4], [[0.9] * 4, [0.9, 0.1, 0.1, 0.1]])[0] == 4
    assert policy.kept([4, 4], [[0.9, 0.3, 0.3, 0.3], [0.9, 0.1, 0.1, 0.1]]) == [1, 1]


@pytest.mark.parametrize("says", [0.02, 0.5, 0.99])
def test_a_word_that_says_nothing_is_not_believed(says: float) -> None:
    """One that is always too low would else keep every guess from being verified."""
    rng, policy = np.random.default_rng(2), Policy(LONGEST, alike=True)
    record, made, steps = policy.record(), 0, 0.0
    for _ in range(300):
        (asked,) = policy.lengths([record], [LONGEST])
        (kept,) = policy.kept([asked], [[says] * asked]) if asked else [0]
        right = outcome(rng, np.full(LONGEST, 0.9), kept)
        step = 1 + 0.3 * kept
        if asked:
            policy.learn_sure([record], [[says] * asked], [kept], [right])
        policy.learn([record], [asked], [kept], [right], 0.1 * (asked > 0), step)
        made, steps = made + right + 1, steps + step + 0.1 * (asked > 0)
    best = sum(0.9**n for n in range(LONGEST + 1)) / (1.1 + 0.3 * LONGEST)
    assert made / steps > 0.94 * best
