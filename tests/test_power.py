"""Windows over simulated meters: the right energy, and every planted fault told."""

import math
import time

import pytest

from ds4.errors import PowerError
from ds4.power import Reading, Sampler, Trace, energy, total
from ds4.power.sampler import now
from tests.power_sim import Clock, Line, Meter, constant, watch

RAMP = Line([(0.0, 80.0), (1000.0, 80.0), (1100.0, 680.0), (1e6, 680.0)])
STEPS = Line(
    [(0.0, 60.0), (1020.0, 60.0), (1020.0, 540.0), (1043.37, 540.0), (1043.37, 90.0), (1e6, 90.0)]
)
START, END = 1011.23, 1071.57


def fraction(value: float | None, truth: float) -> float:
    assert value is not None
    return abs(value - truth) / truth


@pytest.mark.parametrize("line", [constant(350.0), RAMP, STEPS], ids=["constant", "ramp", "steps"])
@pytest.mark.parametrize("kind", ["both", "counter", "watts"])
@pytest.mark.parametrize("jitter", [0.0, 0.35])
def test_energy_is_within_half_a_percent(line: Line, kind: str, jitter: float) -> None:
    clock = Clock()
    meter = Meter(line, clock, counts=kind != "watts", watts=kind != "counter", latency_s=0.004)
    found = watch(clock, meter, seconds=90, jitter=jitter).energies(START, END)[0]
    assert found.valid, found.problems
    assert found.method == ("integral" if kind == "watts" else "counter")
    assert fraction(found.joules, line.joules(START, END)) < 0.005
    assert found.seconds == pytest.approx(END - START)


def test_a_slow_wall_meter_is_still_right_over_a_minute() -> None:
    clock = Clock()
    meter = Meter(RAMP, clock, scope="wall", interval_s=1.0, refresh_s=1.0, counts=False)
    found = watch(clock, meter, seconds=90).energies(START, END)[0]
    assert found.valid
    assert fraction(found.joules, RAMP.joules(START, END)) < 0.005


def test_a_counter_that_wraps_goes_on() -> None:
    clock = Clock()
    wrapping = Meter(constant(200.0), clock, wrap_j=5000.0, watts=False)
    found = watch(clock, wrapping, seconds=90).energies(START, END)[0]
    assert found.valid, found.problems
    assert fraction(found.joules, 200.0 * (END - START)) < 0.005


def problem(meter: Meter, clock: Clock, **options: float) -> str:
    """What is said of a window with a fault in it; no joules are valid."""
    found = watch(clock, meter, seconds=90, **options).energies(START, END)[0]
    assert not found.valid
    return " | ".join(found.problems)


def test_a_gap_is_told() -> None:
    clock = Clock()

    def silent(when: float, reading: Reading) -> Reading:
        if 1030 < when < 1034:
            raise OSError("unplugged")
        return reading

    said = problem(Meter(RAMP, clock, fault=silent), clock)
    assert "no reading for 4." in said
    assert "unplugged" in said


def test_a_thread_that_slept_is_told() -> None:
    clock = Clock()
    meter = Meter(RAMP, clock)
    sampler = watch(clock, meter, seconds=30)
    clock.sleep(5.0)
    while clock() < END + 5:
        clock.sleep(max(sampler.poll(), 1e-4))
    assert "no reading for 5" in " ".join(sampler.energies(START, END)[0].problems)


def test_a_counter_that_was_reset_is_told() -> None:
    clock = Clock()
    meter = Meter(constant(200.0), clock)
    meter.fault = lambda when, r: (
        r if when < 1040 else Reading(r.watts, (r.joules or 0.0) - 207_000.0)
    )
    assert "the counter went back" in problem(meter, clock)


def test_a_counter_that_stands_still_is_told() -> None:
    clock = Clock()
    meter = Meter(constant(200.0), clock, fault=lambda when, r: Reading(r.watts, 42.0))
    assert "counter 0.0 J, integrated power" in problem(meter, clock)


def test_a_power_that_is_off_by_more_than_a_twentieth_is_told_and_less_is_not() -> None:
    for factor, valid in (1.08, False), (1.03, True):
        clock = Clock()
        meter = Meter(
            constant(200.0), clock, fault=lambda w, r, f=factor: Reading(r.watts * f, r.joules)
        )
        found = watch(clock, meter, seconds=90).energies(START, END)[0]
        assert found.valid == valid
        assert found.counter_j is not None
        assert found.joules == found.counter_j


@pytest.mark.parametrize("watts", [-5.0, math.nan, math.inf])
def test_watts_that_cannot_be_are_told(watts: float) -> None:
    clock = Clock()
    meter = Meter(constant(200.0), clock, counts=False)
    meter.fault = lambda when, r: Reading(watts) if 1050 < when < 1050.2 else r
    assert f"read {watts} W" in problem(meter, clock)


def test_a_missing_device_has_no_joules() -> None:
    clock = Clock()

    def dead(when: float, reading: Reading) -> Reading:
        raise PowerError("gone")

    found = watch(clock, Meter(RAMP, clock, fault=dead), seconds=90).energies(START, END)[0]
    assert found.joules is None
    assert "missing" in found.problems[0]


def test_a_reading_that_took_too_long_belongs_to_no_moment() -> None:
    clock = Clock()
    meter = Meter(constant(100.0), clock, interval_s=1.0, latency_s=1.5)
    sampler = watch(clock, meter, seconds=20)
    assert not sampler.traces[0].samples
    assert "took 1.5 s" in sampler.traces[0].faults[0][1]


def test_a_window_that_is_not_covered_or_too_short_is_told() -> None:
    clock = Clock()
    sampler = watch(clock, Meter(constant(100.0), clock), seconds=30)
    before = sampler.energies(990.0, 1020.0)[0]
    assert before.joules is None
    assert "do not cover" in before.problems[0]
    short = sampler.energies(1010.0, 1010.15)[0]
    assert "readings in the window" in short.problems[0]
    edge = sampler.energies(1010.0, 1010.6)[0]
    assert "needs 1" in edge.problems[0]


def test_a_clock_that_goes_back_is_told() -> None:
    trace = Trace("m", "chip", "gpu", 0.1)
    trace.add(10.0, Reading(5.0))
    trace.add(9.0, Reading(5.0))
    assert "did not go forward" in trace.faults[0][1]
    with pytest.raises(ValueError, match="ends after"):
        energy(trace, 5.0, 5.0)


def test_parts_of_a_scope_add_up_and_scopes_stay_apart() -> None:
    clock = Clock()
    gpus = [Meter(constant(300.0), clock, name=f"gpu{i}") for i in range(2)]
    cpu = Meter(constant(50.0), clock, name="cpu", part="cpu", refresh_s=0.001)
    plug = Meter(
        constant(800.0),
        clock,
        "plug",
        "wall",
        "system",
        interval_s=0.5,
        refresh_s=1.0,
        counts=False,
    )
    found = watch(clock, *gpus, cpu, plug, seconds=90).energies(START, END)
    chip, wall = total(found, "chip"), total(found, "wall")
    assert chip is not None
    assert wall is not None
    assert chip.covers == "cpu+gpu"
    assert chip.valid
    assert fraction(chip.joules, 650 * (END - START)) < 0.005
    assert fraction(wall.joules, 800 * (END - START)) < 0.005
    assert total(found, "dc-system") is None


def test_one_missing_part_makes_no_sum() -> None:
    clock = Clock()
    meters = [Meter(constant(300.0), clock, name=f"gpu{i}") for i in range(2)]
    sampler = watch(clock, *meters, seconds=90)
    sampler.traces[1].samples.clear()
    found = total(sampler.energies(START, END), "chip")
    assert found is not None
    assert found.joules is None
    assert not found.valid


def test_the_thread_reads_until_it_is_stopped() -> None:
    class Still:
        name, scope, part, interval_s, refresh_s, wrap_j = "s", "chip", "gpu", 0.01, 0.01, None
        closed = False

        def read(self) -> Reading:
            return Reading(watts=7.0)

        def close(self) -> None:
            self.closed = True

    source = Still()
    with Sampler([source]) as sampler:
        while len(sampler.traces[0].samples) < 3:
            time.sleep(0.01)
        start = now()
        while now() < start + 0.15 or len(sampler.traces[0].samples) < 20:
            time.sleep(0.01)
        end = now()
    found = sampler.energies(start, end)[0]
    assert found.joules == pytest.approx(7.0 * (end - start), rel=1e-6)
    assert source.closed
