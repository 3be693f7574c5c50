"""From a run to a results file: joules by phase, idle, repetitions, what is invalid."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from ds4.bench import results as files
from ds4.bench.run import Protocol
from ds4.bench.summary import relative_interval
from ds4.bench.tables import markdown, summary_tables, summary_text, terminal
from ds4.bench.workload import Workload
from ds4.errors import BenchError
from ds4.power import Reading
from ds4.power.calibration import Calibration
from tests.bench_sim import measured
from tests.power_sim import Clock, Meter, constant
from tests.test_bench_load import Metronome

SINGLE = Workload("single", prompt_tokens=100, output_tokens=50, seconds=60, prefill=True)


class Busy:
    """60 W idle, 300 W while an engine has requests: a Line whose future is not known."""

    def __init__(self, clock: Clock, engine: Metronome) -> None:
        self.clock, self.engine = clock, engine
        self.total, self.since = 0.0, clock()

    def watts(self, when: float) -> float:
        return 300.0 if self.engine.running else 60.0

    def joules(self, start: float, end: float) -> float:
        self.total += (end - self.since) * self.watts(end)
        self.since = end
        return self.total


def gpu(clock: Clock, engine: Metronome) -> list[Meter]:
    return [Meter(Busy(clock, engine), clock, name="gpu")]  # type: ignore[arg-type]


def test_joules_a_token_are_known_by_phase_and_net_of_idle() -> None:
    found = measured([SINGLE], gpu)
    (row,) = found["summary"]
    assert row["repetitions"] == 3
    assert row["problems"] == []
    assert row["spread"] == pytest.approx(0, abs=0.001)
    # 0.1 s for a prompt of 100 tokens, then 49 steps of 10 ms
    assert row["figures"]["output_tok_s"] == pytest.approx(50 / 0.59, rel=0.01)
    assert row["prefill_tok_s"] == pytest.approx(1000, rel=0.01)
    energy = row["energy"]["chip"]
    assert energy["power_valid"], energy["problems"]
    assert energy["watts"] == pytest.approx(300, rel=0.005)
    assert energy["idle_watts"] == pytest.approx(60, rel=0.005)
    assert energy["j_per_output_token"] == pytest.approx(300 * 0.59 / 50, rel=0.01)
    assert energy["net_j_per_output_token"] == pytest.approx(240 * 0.59 / 50, rel=0.01)
    assert energy["prefill_j_per_prompt_token"] == pytest.approx(0.3, rel=0.01)
    assert energy["decode_j_per_output_token"] == pytest.approx(300 * 0.49 / 50, rel=0.01)
    assert energy["tokens_per_j"] == pytest.approx(1 / energy["j_per_output_token"])
    assert energy["capex_usd_per_mtok"] > 0
    assert energy["usd_per_mtok"] == pytest.approx(
        energy["capex_usd_per_mtok"] + energy["electricity_usd_per_mtok"]
    )
    whole = found["power"]["whole"][0]
    assert whole["counter_j"] == pytest.approx(whole["integral_j"], rel=0.05)


def test_the_file_holds_every_sample_and_is_read_back(tmp_path: Path) -> None:
    found = measured([SINGLE], gpu)
    path = tmp_path / "box.json"
    files.save(path, found)
    again = files.read(path)
    assert again == json.loads(json.dumps(found))
    run = next(run for run in again["runs"] if run["phase"] == "main")
    assert len(run["records"][0]["tokens"]) == 50
    assert len(again["samples"]["gpu"]["watts"]) == len(again["samples"]["gpu"]["seconds"]) > 1000
    assert again["environment"]["commit"] == "abc"
    for text, said in ("{", "is not valid JSON"), ('{"format":"x"}', "not a results file"):
        path.write_text(text)
        with pytest.raises(BenchError, match=said):
            files.read(path)
    path.write_text(json.dumps(found | {"version": 9}))
    with pytest.raises(BenchError, match="version 9, this ds4 reads 1"):
        files.read(path)
    del found["samples"]
    path.write_text(json.dumps(found))
    with pytest.raises(BenchError, match="field samples is missing"):
        files.read(path)
    with pytest.raises(BenchError, match="cannot be written"):
        files.save(tmp_path / "none" / "a.json", found)


def test_without_a_meter_there_are_speeds_and_no_joules() -> None:
    found = measured([SINGLE])
    (row,) = found["summary"]
    assert row["energy"] == {}
    assert row["cost"]["electricity_usd_per_mtok"] is None
    assert row["cost"]["usd_per_mtok"] is None
    assert row["figures"]["output_tok_s"] > 0
    text = summary_text(found)
    assert "no meter: energy is not known" in text
    assert "nvml: no GPU" in text
    assert " J" not in text


def test_a_gap_makes_its_window_invalid_and_no_figure_of_it_is_shown() -> None:
    def broken(clock: Clock, engine: Metronome) -> list[Meter]:
        def silent(when: float, reading: Reading) -> Reading:
            if engine.running and when % 60 < 10:
                raise OSError("unplugged")
            return reading

        return [Meter(constant(200.0), clock, name="gpu", fault=silent)]

    found = measured([SINGLE], broken)
    energy = found["summary"][0]["energy"]["chip"]
    assert not energy["power_valid"]
    table = summary_tables(found)[2]
    assert table.rows[0][2:] == ["invalid"] * 7
    assert "unplugged" in " ".join(table.notes)
    assert "invalid" in markdown(table)


def test_a_calibration_gives_an_estimated_wall_only_on_its_machine() -> None:
    line = Calibration("A <fast> CPU", "chip", "gpu", 40, 1.1, 60, 300, 0.01, 9, "plug")
    found = measured([SINGLE], gpu, calibration=line)
    wall = found["summary"][0]["energy"]["estimated wall"]
    assert wall["watts"] == pytest.approx(40 + 1.1 * 300, rel=0.01)
    assert wall["idle_watts"] == pytest.approx(40 + 1.1 * 60, rel=0.01)
    other = measured([SINGLE], gpu, calibration=replace(line, machine="another"))
    assert "estimated wall" not in other["summary"][0]["energy"]


def test_what_does_not_fit_is_skipped_with_the_reason() -> None:
    long = replace(SINGLE, name="long", prompt_tokens=5000)
    found = measured([long, SINGLE])
    assert found["skipped"] == [
        {
            "recipe": "native",
            "workload": "long",
            "reason": "needs 5,050 tokens of context, there are 5,000",
        }
    ]
    assert "long native was not measured" in terminal(summary_tables(found)[0])


def test_several_recipes_make_the_table_of_recipes() -> None:
    found = measured([SINGLE], gpu, recipes=["native", "q2"], protocol=Protocol(repeat=1))
    assert [row["recipe"] for row in found["summary"]] == ["native", "q2"]
    text = summary_text(found)
    assert "recipe  weights GB  memory GB  decode tok/s" in text


def test_order_is_random_and_the_same_for_the_same_seed() -> None:
    work = [replace(SINGLE, name=f"w{i}", seconds=1, prefill=False) for i in range(6)]

    def order(seed: int) -> list[Any]:
        found = measured(work, protocol=Protocol(repeat=2, seed=seed, idle_s=0))
        return [(run["workload"], run["repetition"]) for run in found["runs"]]

    assert order(1) == order(1) != order(2)
    assert order(1) != sorted(order(1))


def test_the_interval_of_repetitions() -> None:
    assert relative_interval([1.0, 2.0]) is None
    assert relative_interval([99.0, 100.0, 101.0]) == pytest.approx(4.303 * 1 / 3**0.5 / 100)
