"""A line from what a chip's sensor says to what the wall gives, and clocks that agree."""

import time
from pathlib import Path

import pytest

from ds4.errors import PowerError
from ds4.power import Total, Trace
from ds4.power import calibration as calibrating
from ds4.power.meter_file import read_meter
from tests.power_sim import Clock, Line, Meter, constant, watch


def calibrated(noise: float = 0.0) -> tuple[calibrating.Calibration, list[Trace]]:
    """From a machine that takes 45 W + 1.12 times what its GPU says."""
    clock = Clock()
    points = [(0.0, 70.0), (1100.0, 70.0), (1100.0, 400.0), (1200.0, 400.0), (1e6, 400.0)]
    chip = Meter(Line(points), clock)
    outside = Line([(t, 45 + 1.12 * w) for t, w in points])
    plug = Meter(outside, clock, "plug", "wall", "system", 0.5, 0.9, counts=False)
    traces = watch(clock, chip, plug, seconds=200).traces
    return calibrating.fit(traces, "box"), traces


def test_a_calibration_finds_the_line_and_says_that_it_estimates(tmp_path: Path) -> None:
    made, traces = calibrated()
    assert made.base_w == pytest.approx(45, abs=3)
    assert made.slope == pytest.approx(1.12, rel=0.01)
    assert made.error < 0.02
    made.save(tmp_path / "box.json")
    line = calibrating.load(tmp_path / "box.json")
    assert line == made
    measured = Total("chip", "gpu", 10.0, 4000.0)
    wall = line.wall(measured)
    assert (wall.scope, wall.covers) == ("estimated wall", "system")
    assert wall.joules == pytest.approx(4930, rel=0.01)
    assert wall.valid
    assert line.fits(measured, "box")
    assert not line.fits(measured, "another box")
    assert not line.fits(Total("chip", "cpu+gpu", 10.0, 4000.0), "box")
    assert "900 W, it was made from" in line.wall(Total("chip", "gpu", 10.0, 9000.0)).problems[0]
    with pytest.raises(PowerError, match="needs a meter at the wall"):
        calibrating.fit(traces[:1], "box")


def test_a_calibration_at_one_load_is_refused() -> None:
    clock = Clock()
    plug = Meter(constant(900.0), clock, "plug", "wall", "system", 0.5, 0.9, counts=False)
    traces = watch(clock, Meter(constant(500.0), clock), plug, seconds=200).traces
    with pytest.raises(PowerError, match="from 500 to 500 W"):
        calibrating.fit(traces, "box")


def test_a_calibration_file_of_something_else_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "box.json"
    for text in "{}", "[1]", "3":
        file.write_text(text)
        with pytest.raises(PowerError, match="not a calibration"):
            calibrating.load(file)


def test_clocks_of_the_meters_file_and_the_sampler_agree(tmp_path: Path) -> None:
    from ds4.power.sampler import now

    offset = time.time() - now()
    file = tmp_path / "meter.csv"
    file.write_text("time,watts\n" + "\n".join(f"{time.time() + i},5" for i in range(3)))
    assert read_meter(file, offset).samples[0][0] == pytest.approx(now(), abs=30)
