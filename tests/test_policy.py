"""How many tokens are guessed, in simulated time."""

from collections.abc import Callable, Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from ds4.draft.costs import Costs
from ds4.draft.misses import Misses
from ds4.draft.policy import Policy, Record

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
    record = policy.record()
    shapes: dict[int, int] = {}
    for count, accepted in rounds(right, lambda: policy.lengths([record], [LONGEST])[0], 1):
        step, draft = times(count + 1), DRAFT * count
        total += step + draft
        shapes[count] = shapes.get(count, 0) + 1
        slow = 30 if shapes[count] <= 2 else 1 + noise * rng.random()  # the first ones compile
        policy.learn([record], [count], [count], [accepted], draft * slow, step * slow)
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


def steps_of(policy: Policy, batch: int, slope: float, counts: Sequence[int]) -> list[Record]:
    """Let it see steps of so many guesses each, all right, that take 1 s and `slope` a guess."""
    records = [policy.record() for _ in range(batch)]
    for count in counts:
        each = [count] * batch
        policy.learn(records, each, each, each, 0.01 * (count > 0), 1 + slope * count)
    return records


def test_a_round_is_foreseen_where_the_one_before_it_cannot_matter() -> None:
    policy = Policy(3, alike=True)
    assert policy.foresee([policy.record()], [3]) is None  # nothing is known yet
    steps_of(policy, 1, 0.1, (0, 1, 2, 3) * 5)
    rich, poor = Record([0.9] * 3, spare=4.0), Record([0.9] * 3, spare=0.5)
    assert policy.lengths([rich], [3]) == policy.foresee([rich], [3]) == [3]
    assert policy.lengths([poor], [3]) == [3]
    assert policy.foresee([poor], [3]) is None  # it could not lose two such rounds
    policy.lengths([rich], [3])
    policy._rounds[1, 0] = 10**6  # plain steps are to be seen again
    assert policy.foresee([rich], [3]) is None


def test_a_full_batch_guesses_less() -> None:
    policy = Policy(3)
    for batch, slope in ((1, 0.05), (8, 0.9)):
        steps_of(policy, batch, slope, (0, 1, 2, 3) * 5)
    assert policy.lengths([Record([0.9] * 3)], [3]) == [3]
    assert policy.lengths([Record([0.6] * 3)], [3])[0] > 0
    assert policy.lengths([Record([0.6] * 3) for _ in range(8)], [3] * 8) == [0] * 8
    assert policy.lengths([policy.record()] * 2, [3] * 2) == [0, 0]  # first what plain steps take


def test_times_are_those_of_texts_about_as_long() -> None:
    policy = Policy(3)
    steps_of(policy, 1, 0.05, (0, 1, 2, 3) * 5)
    assert policy.lengths([Record([0.7] * 3)], [3]) == [3]
    policy.costs.span = 1 << 16
    assert policy.lengths([Record([0.7] * 3)], [3]) == [0]  # plain steps of such were not seen
    steps_of(policy, 1, 0.9, (0, 1, 2, 3) * 5)
    assert policy.lengths([Record([0.7] * 3)], [3]) == [0]


def test_times_of_other_texts_that_chance_has_made_flat() -> None:
    """9 rows seemed no slower than 4: what lies between 5 and 7 is told by its own neighbours."""
    costs = Costs(alike=False, misses=None)
    for costs.span, times in (
        (256, {1: 0.0100, 2: 0.0101, 3: 0.0102, 4: 0.0104, 9: 0.0103}),
        (512, {1: 0.0105, 5: 0.0110, 7: 0.0111}),
    ):
        for rows, seconds in times.items():
            for _ in range(6):
                costs.learn(1, rows - 1, rows - 1, rows - 1, 1e-5, seconds)
    told = [costs.step(1, rows - 1) for rows in range(1, 12)]
    assert told[5] == pytest.approx(0.01105)
    assert told == sorted(told)


def test_plain_steps_that_were_slow_once_are_seen_again() -> None:
    policy, guessed = Policy(2), 0
    record, plain = policy.record(), [9.0] * 5  # another program was busy
    for _ in range(2000):
        count = policy.lengths([record], [2])
        if count == [0]:
            seconds = plain.pop() if plain else 1.0
            policy.learn([record], count, count, [0], 0.0, seconds)
        else:
            guessed += 1
            policy.learn([record], count, count, [1], 0.5, 2.5)
    assert guessed < 1000
    assert policy.lengths([record], [2]) == [0]


def test_each_sequence_has_its_own_length() -> None:
    policy = Policy(4)
    steps_of(policy, 3, 0.2, (0, 1, 2, 3, 4) * 5)
    sure, fair, poor = Record([0.95] * 4), Record([0.8, 0.5, 0.2, 0.1]), Record([0.02] * 4)
    counts = policy.lengths([sure, fair, poor], [4, 4, 4])
    assert counts[0] == 4 > counts[1] > counts[2] == 0
    assert policy.lengths([sure, fair, poor], [2, 4, 0])[0] == 2
    poor.plain = 2000  # long enough for a try beside the others
    assert policy.lengths([sure, fair, poor], [4, 4, 4]) == [*counts[:2], 1]
    assert policy.lengths([sure, fair, poor], [4, 4, 0]) == [*counts[:2], 0]


def test_where_steps_are_recorded_all_have_the_rows_of_the_longest() -> None:
    policy = Policy(3, alike=True)
    steps_of(policy, 2, 0.1, (0, 1, 2, 3) * 5)
    assert policy.lengths([Record([0.9] * 3), Record([0.1] * 3)], [3, 2]) == [3, 2]


def test_a_sequence_learns_from_itself_and_a_new_one_from_all() -> None:
    policy = Policy(2)
    good, bad = policy.record(), policy.record()
    for _ in range(60):
        policy.learn([good, bad], [2, 2], [2, 2], [2, 0], 0.1, 1.0)
    assert good.right[0] > 0.9 > 0.1 > bad.right[0]
    assert bad.right[0] < policy.record().right[0] < good.right[0]
    assert policy.saved_s == 0  # no plain step was seen
    for _ in range(5):
        policy.learn([good, bad], [0, 0], [0, 0], [0, 0], 0.0, 1.0)
    policy.learn([good, bad], [2, 2], [2, 2], [2, 1], 0.1, 1.0)
    assert policy.saved_s == pytest.approx(2.5 - 1.1)


def test_a_slow_moment_does_not_end_guessing() -> None:
    policy = Policy(3, alike=True)
    record = policy.record()
    for step_s in [9.0, 9.0, 1.0, 1.0, 1.0]:
        policy.learn([record], [0], [0], [0], 0.0, step_s)
    for step_s in [9.0, 9.0, 1.1, 9.0, 1.1, 1.1]:  # to compile, to record, and a slow one
        (count,) = policy.lengths([record], [3])
        assert count > 0
        policy.learn([record], [count], [count], [count], 0.1, step_s)
    assert policy.lengths([record], [3]) != [0]


def test_guesses_that_are_seldom_found_pay_if_looking_for_them_costs_nothing() -> None:
    for empty, asks in ((1.0, True), (1.2, False)):
        policy = Policy(4)
        record = steps_of(policy, 1, 0.1, (0, 1, 2, 3, 4) * 5)[0]
        for _ in range(150):
            policy.learn([record], [4], [0], [0], 0.0, empty)
        assert record.found < 0.05
        record.plain = policy._plain = 0
        policy._rounds.clear()
        assert (policy.lengths([record], [4]) != [0]) == asks


def test_experts_in_host_memory_make_rows_dearer_before_they_were_measured() -> None:
    placement = SimpleNamespace(
        report=lambda: SimpleNamespace(hit_rate=0.5, host_rate=1e9),
        budget=SimpleNamespace(need=SimpleNamespace(expert=10**7)),
    )
    cfg: Any = SimpleNamespace(n_routed_experts=256, num_experts_per_tok=6, num_hidden_layers=43)
    misses = Misses(placement, cfg)
    each = 43 * 0.5 * 10**7 / 1e9  # seconds of an expert more in every layer
    assert misses(1) == pytest.approx(6 * each)
    assert misses(2) == pytest.approx(256 * (1 - (250 / 256) ** 2) * each)
    for more, count in ((None, 1), (misses, 0)):  # the first try is one guess
        policy = Policy(5, misses=more)
        steps_of(policy, 1, 0.0, (0,) * 6)
        assert policy.lengths([Record([0.7] * 5)], [5]) == [count]
