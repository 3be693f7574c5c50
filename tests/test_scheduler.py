"""The scheduler: order, budgets, and that no slot is lost or used twice."""

import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ds4.engine.api import QueueFull
from ds4.engine.scheduler import PATIENCE, Job, Limits, Scheduler
from ds4.errors import ConfigError


def admit_all(scheduler: Scheduler) -> list[str]:
    admitted = []
    while job := scheduler.next():
        admitted.append(job.id)
        scheduler.admit(job, next(iter(scheduler.idle)))
    return admitted


def run_step(scheduler: Scheduler) -> list[tuple[str, int]]:
    work = scheduler.plan()
    scheduler.absorbed(work)
    return [(job.id, count) for job, count in work.prefill]


def test_lower_priority_numbers_go_first_then_arrival() -> None:
    scheduler = Scheduler(slots=3, chunk=8)
    for name, priority in (("a", 1), ("b", 0), ("c", 0), ("d", 1)):
        scheduler.submit(Job(name, 5, priority))
    assert admit_all(scheduler) == ["b", "c", "a"]


def test_chunks_end_at_multiples_whatever_else_runs() -> None:
    scheduler = Scheduler(slots=2, chunk=8)
    job = Job("long", 21)
    scheduler.submit(job)
    scheduler.admit(job, 0, done=3)  # a known prefix
    assert [run_step(scheduler) for _ in range(4)] == [
        [("long", 5)],
        [("long", 8)],
        [("long", 5)],
        [],
    ]
    assert job.decoding
    assert scheduler.plan().decode == [job]


def test_short_prompts_share_a_step_and_pass_a_long_one() -> None:
    scheduler = Scheduler(slots=4, chunk=8)
    for name, total in (("long", 80), ("x", 3), ("y", 5), ("z", 2)):
        scheduler.submit(Job(name, total))
    admit_all(scheduler)
    assert run_step(scheduler) == [("z", 2), ("x", 3)]  # y no longer fits: 2 + 3 + 5 > 8
    assert run_step(scheduler) == [("y", 5)]
    assert run_step(scheduler) == [("long", 8)]


def test_a_long_prompt_is_not_starved_by_short_ones() -> None:
    scheduler = Scheduler(slots=2, chunk=8)
    long = Job("long", 80)
    scheduler.submit(long)
    scheduler.admit(long, 0)
    steps = 0
    while not long.decoding:  # a new prompt of a whole chunk each step
        other = Job(f"short{steps}", 8)
        scheduler.submit(other)
        admit_all(scheduler)
        run_step(scheduler)
        if other.decoding:
            scheduler.remove(other)
        for job in [job for job in scheduler.running.values() if job.decoding and job is not long]:
            scheduler.remove(job)
        steps += 1
        assert steps < 40


def test_a_waiting_job_is_passed_only_so_often() -> None:
    scheduler = Scheduler(slots=1, chunk=8)
    last = Job("last", 8, priority=9)
    scheduler.submit(last)
    for turn in range(PATIENCE + 1):
        scheduler.submit(Job(str(turn), 1))
        admitted = admit_all(scheduler)
        scheduler.remove(scheduler.running[0])
        assert admitted == (["last"] if turn == PATIENCE else [str(turn)])


def test_a_limit_that_allows_no_token_is_refused() -> None:
    with pytest.raises(ConfigError, match="new_tokens must be at least 1"):
        Limits(new_tokens=0)


def test_a_full_queue_says_when_to_come_back() -> None:
    scheduler = Scheduler(1, 8, Limits(waiting=2, waiting_tokens=100))
    scheduler.submit(Job("a", 90))
    with pytest.raises(QueueFull) as full:
        scheduler.submit(Job("b", 20))
    assert full.value.retry_after_s >= 1
    scheduler.measured(seconds=50.0, absorbed=10, admitted=1)
    with pytest.raises(QueueFull) as full:
        scheduler.submit(Job("b", 20))
    assert full.value.retry_after_s == 50.0  # ten tokens too many, at 5 s each
    scheduler.submit(Job("c", 10))
    with pytest.raises(QueueFull):
        scheduler.submit(Job("d", 0))
    assert scheduler.waiting_tokens == 100


def test_a_job_that_is_not_ready_lets_others_pass() -> None:
    scheduler = Scheduler(slots=1, chunk=8)
    slow = Job("slow", 4, ready=False)
    scheduler.submit(slow)
    scheduler.submit(Job("b", 4))
    assert admit_all(scheduler) == ["b"]
    slow.ready = True
    assert scheduler.next() is None  # no slot


ACTIONS = st.lists(
    st.one_of(
        st.tuples(st.just("submit"), st.integers(1, 40), st.integers(0, 2)),
        st.tuples(st.just("step"), st.integers(0, 3), st.just(0)),
        st.tuples(st.just("cancel"), st.integers(0, 30), st.just(0)),
    ),
    max_size=60,
)


@given(slots=st.integers(1, 4), chunk=st.integers(1, 9), actions=ACTIONS)
def test_slots_and_budgets_hold_whatever_happens(
    slots: int, chunk: int, actions: list[tuple[str, int, int]]
) -> None:
    """Random arrivals, cancellations and ends; then everything drains."""
    limits = Limits(waiting=6, waiting_tokens=120)
    scheduler, alive = Scheduler(slots, chunk, limits), list[Job]()

    def step(ends: int) -> None:
        admit_all(scheduler)
        work = scheduler.plan()
        assert sum(count for _, count in work.prefill) <= chunk
        assert len({id(job) for job, _ in work.prefill}) == len(work.prefill)
        assert all(count > 0 for _, count in work.prefill)
        assert bool(work.decode or work.prefill) == bool(scheduler.running)
        assert all(job.done == job.total for job in work.decode)
        scheduler.absorbed(work)
        for job in work.decode[:ends]:
            scheduler.remove(job)
            alive.remove(job)

    def check() -> None:
        held = [job.slot for job in alive if job.slot is not None]
        assert sorted([*held, *scheduler.idle]) == list(range(slots))
        assert scheduler.running == {job.slot: job for job in alive if job.slot is not None}
        assert len(scheduler.waiting) <= limits.waiting
        assert scheduler.waiting_tokens == sum(job.total for job in scheduler.waiting)
        assert set(map(id, scheduler.waiting)) == {id(j) for j in alive if j.slot is None}

    for number, (action, value, priority) in enumerate(actions):
        if action == "submit":
            job = Job(str(number), value, priority)
            with contextlib.suppress(QueueFull):
                scheduler.submit(job)
                alive.append(job)
        elif action == "step":
            step(value)
        elif alive:
            scheduler.remove(alive.pop(value % len(alive)))
        check()
    for _ in range(sum(job.total for job in alive) + len(alive) + 1):
        step(slots)
        check()
    assert not alive
