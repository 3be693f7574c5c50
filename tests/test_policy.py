"""How many tokens are guessed, in simulated time."""

from collections.abc import Callable, Iterator

import numpy as np
import pytest

from ds4.draft.policy import Policy

LONGEST, TOKENS = 5, 6000
Times = Callable[[int], float]  # rows -> seconds

FLAT: Times = lambda rows: 1 + 0.03 * (rows - 1)  # noqa: E731
LINEAR: Times = lambda rows: 1 + 0.3 * (rows - 1)  # noqa: E731
STAIRS: Times = lambda rows: 1.0 if rows <= 2 else 1.5 if rows <= 4 else 2.4  # noqa: E731
STEEP: Times = lambda rows: float(rows)  # noqa: E731
DRAFT = 0.08


def rounds(
    right: Callable[[int], float], choose: Callable[[], int], seed: int
) -> Iterator[tuple[int, int]]:
    """(guesses, accepted) until TOKENS are made; `right(done)` is how likely a guess is right."""
    rng, done = np.random.default_rng(seed), 0
    while done < TOKENS:
        count, accepted = choose(), 0
        while accepted < count and rng.random() < right(done):
            accepted += 1
        done += accepted + 1
        yield count, accepted


def fixed(right: Callable[[int], float], times: Times, count: int) -> float:
    return sum(times(k + 1) + DRAFT * k for k, _ in rounds(right, lambda: count, 1))


def adaptive(right: Callable[[int], float], times: Times, noise: float = 0.1) -> float:
    policy, rng, total = Policy(LONGEST), np.random.default_rng(2), 0.0
    shapes: dict[int, int] = {}
    for count, accepted in rounds(right, lambda: policy.length(1), 1):
        step, draft = times(count + 1), DRAFT * count
        total += step + draft
        shapes[count] = shapes.get(count, 0) + 1
        slow = 30 if shapes[count] <= 2 else 1 + noise * rng.random()  # the first ones compile
        policy.learn([count], [accepted], draft * slow, step * slow)
    return total


@pytest.mark.parametrize(
    "times", [FLAT, LINEAR, STAIRS, STEEP], ids=["flat", "linear", "stairs", "steep"]
)
@pytest.mark.parametrize("chance", [0.0, 0.5, 0.7, 0.9])
def test_it_is_as_fast_as_the_best_length_and_never_slower_than_plain(
    chance: float, times: Times
) -> None:
    each = [fixed(lambda _: chance, times, count) for count in range(LONGEST + 1)]
    got = adaptive(lambda _: chance, times)
    assert got <= 1.05 * min(each)
    assert got <= each[0] / 0.98


@pytest.mark.parametrize("times", [FLAT, LINEAR, STAIRS], ids=["flat", "linear", "stairs"])
def test_it_follows_a_text_that_changes(times: Times) -> None:
    def right(done: int) -> float:
        return (0.9, 0.3, 0.7)[done // 1000 % 3]

    each = [fixed(right, times, count) for count in range(LONGEST + 1)]
    got = adaptive(right, times)
    assert got <= 1.05 * min(each)
    assert got <= each[0] / 0.98


def test_a_full_batch_guesses_less() -> None:
    policy = Policy(3)
    for batch, slope in ((1, 0.05), (8, 0.9)):
        for count in (0, 1, 2, 3) * 4:
            policy.learn([count] * batch, [count] * batch, 0.01, 1 + slope * count)
    assert policy.length(1) == 3
    policy.right = [0.6] * 3
    assert policy.length(1) > 0
    assert policy.length(8) == 0
    assert policy.length(2) == 0  # never seen: first what a plain step takes
