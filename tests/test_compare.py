"""Results beside each other: what is alike, what is not, and every format."""

import csv
import io
import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from ds4.bench import article, formats
from ds4.bench.compare import document, not_alike, nothing_in, rows_of, tables
from ds4.bench.cost import Terms, even_tariff
from ds4.bench.html import page
from ds4.bench.plots import plots
from ds4.bench.run import Protocol
from ds4.bench.svg import Axis, nice, tick_text
from ds4.bench.tables import Table, dollars, number
from ds4.bench.workload import Workload
from ds4.cli import app
from ds4.errors import BenchError
from ds4.power import Reading
from tests.bench_sim import measured
from tests.power_sim import Clock, Meter, constant
from tests.test_bench_load import Metronome

WORK = Workload("closed@1", prompt_tokens=100, output_tokens=50, seconds=10, prefill=True)
MANY = [WORK, replace(WORK, name="closed@4", concurrency=4, requests=12, prefill=False)]
ONCE = Protocol(repeat=1, idle_s=20)


def meters(watts: float, **options: Any) -> Any:
    def make(clock: Clock, engine: Metronome) -> list[Meter]:
        return [Meter(constant(watts), clock, name=f"meter {watts:g}", **options)]

    return make


WALL = {"scope": "wall", "part": "system", "interval_s": 0.5, "refresh_s": 0.9, "counts": False}


@pytest.fixture(scope="module")
def box() -> dict[str, Any]:
    return measured(MANY, meters(200.0), "box", protocol=ONCE, terms=Terms(2000))


@pytest.fixture(scope="module")
def rig() -> dict[str, Any]:
    return measured(MANY, meters(400.0), "rig", protocol=ONCE, terms=Terms(4000))


@pytest.fixture(scope="module")
def plugged() -> dict[str, Any]:
    return measured(MANY, meters(500.0, **WALL), "plugged", protocol=ONCE, terms=Terms(None))


def named(found: list[Table], part: str) -> list[Table]:
    return [table for table in found if part in table.title]


def test_like_results_share_a_table(box: Any, rig: Any) -> None:
    found = tables(rows_of([box, rig]))
    (energy,) = named(
        found, "closed (100 tokens in, 50 out), metronome, native: energy, chip (gpu)"
    )
    assert [row[:2] for row in energy.rows] == [
        [name, load] for load in ("1 at once", "4 at once") for name in ("box", "rig")
    ]
    assert energy.notes == [
        f"{n} at once: box makes 2.00 times as many tokens a joule as rig" for n in (1, 4)
    ]
    (money,) = named(found, "closed (100 tokens in, 50 out), metronome, native: cost")
    assert money.rows[0][3] == "$2,000.00"
    assert not_alike(rows_of([box, rig])) == []


def test_unlike_scopes_are_never_in_one_table(box: Any, plugged: Any) -> None:
    found = tables(rows_of([box, plugged]))
    for table in named(found, ": energy"):
        assert len({row[0] for row in table.rows}) == 1
    (chip,) = named(found, "closed (100 tokens in, 50 out), metronome, native: energy, chip")
    assert chip.notes == ["plugged is not compared: it was measured at wall (system)"]
    (money,) = named(found, "closed (100 tokens in, 50 out), metronome, native: cost")
    assert "unlike places: do not compare" in " ".join(money.notes)
    assert money.rows[1][7] == "-"


def test_unlike_recipes_workloads_and_models_are_never_in_one_table(box: Any) -> None:
    other = json.loads(json.dumps(box))
    other["label"] = "other"
    other["targets"][0]["recipe"] = other["summary"][0]["recipe"] = "q2"
    other["summary"][1]["recipe"] = "q2"
    longer = measured([replace(WORK, output_tokens=40)], label="longer", protocol=ONCE)
    renamed = json.loads(json.dumps(box)) | {"label": "renamed"}
    renamed["targets"][0]["model"] = "another"
    rows = rows_of([box, other, longer, renamed])
    for table in tables(rows):
        assert len({row[0] for row in table.rows}) == 1
    said = not_alike(rows)
    assert (
        "closed (100 tokens in, 50 out), metronome, q2, 1 at once, 4 at once: "
        "no like result of box, longer, renamed"
    ) in said
    assert len(said) == 4


def test_files_of_one_machine_add_up_but_do_not_repeat(box: Any) -> None:
    assert len(rows_of([box])) == 2
    with pytest.raises(BenchError, match="two files of 'box' have the same workload"):
        rows_of([box, box])


def test_a_file_without_results_is_named(box: Any) -> None:
    empty = box | {"label": "empty", "summary": [], "runs": []}
    assert nothing_in([box, empty]) == ["empty: no workload was measured"]
    assert "empty: no workload was measured" in page(rows_of([box, empty]), [box, empty])


def test_terms_can_be_replaced(box: Any, rig: Any) -> None:
    rows = rows_of([box, rig], {"box": 9000.0}, duty=1.0, tariff=0.5)
    assert [row.terms.price for row in rows if row.summary["workload"] == "closed@1"] == [
        9000,
        4000,
    ]
    assert {row.terms.duty for row in rows} == {1.0}
    with pytest.raises(BenchError, match="no file has the label 'mac'"):
        rows_of([box], {"mac": 1.0})
    mixed = rows_of([box, rig | {"terms": rig["terms"] | {"duty": 0.1}}])
    assert "the terms differ" in " ".join(named(tables(mixed), "cost")[0].notes)


def test_an_invalid_run_is_shown_as_invalid_everywhere(box: Any) -> None:
    def broken(clock: Clock, engine: Metronome) -> list[Meter]:
        def silent(when: float, reading: Reading) -> Reading:
            if engine.running:
                raise OSError("unplugged")
            return reading

        return [Meter(constant(200.0), clock, name="gpu", fault=silent)]

    bad = measured(MANY, broken, "bad", protocol=ONCE)
    rows = rows_of([box, bad])
    (energy,) = named(tables(rows), "closed (100 tokens in, 50 out), metronome, native: energy")
    assert energy.rows[1] == ["bad", "1 at once", *["invalid"] * 7]
    assert "times as many" not in " ".join(energy.notes)
    text = page(rows, [box, bad])
    assert '<td class="bad">invalid</td>' in text
    assert 'class="window invalid"' in text
    assert "2 windows that are not valid are not drawn" in text
    lines = list(csv.DictReader(io.StringIO(formats.as_csv(rows))))
    assert [line["power_valid"] for line in lines if line["machine"] == "bad"] == ["False"] * 2
    assert all(not line["watts"] for line in lines if line["machine"] == "bad")


class Balanced(HTMLParser):
    """Fails for a tag that is not closed, or not by its own."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.links: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.links += [str(value) for name, value in attrs if name in ("src", "href")]
        if tag not in ("meta",):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        pass

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_the_page_stands_alone_and_is_well_formed(box: Any, rig: Any) -> None:
    text = page(rows_of([box, rig]), [box, rig])
    parser = Balanced()
    parser.feed(text)
    assert parser.open == []
    assert parser.links == []
    assert "<script" not in text
    assert "prefers-color-scheme:dark" in text
    assert "A &lt;fast&gt; CPU" in text
    drawings = re.findall(r"<svg.*?</svg>", text, re.S)
    for drawing in drawings:
        ElementTree.fromstring(drawing.replace("<svg ", "<svg ", 1))
    assert len([one for one in drawings if "aria-label" in one]) == len(
        plots(rows_of([box, rig]), [box, rig])
    )


def test_plots_have_axes_with_units_and_all_machines(box: Any, rig: Any) -> None:
    drawn = {
        plot.heading.partition(",")[0]: plot for plot in plots(rows_of([box, rig]), [box, rig])
    }
    assert set(drawn) >= {"Throughput against latency", "Tokens a joule", "Cost of output"}
    for heading, units in {
        "Throughput against latency": ("median (ms)", "(tok/s)"),
        "Tokens a joule": ("sequences at once", "(= tok/s/W)"),
        "Cost of output": ("dollars a million output tokens",),
        "Power over time": ("(s)", "(W)"),
    }.items():
        assert all(unit in drawn[heading].drawing for unit in units)
    assert [name for _, name in drawn["Tokens a joule"].legend] == ["box native", "rig native"]
    pareto = drawn["Throughput against latency"].drawing
    assert pareto.count('class="mark"') == 4
    inside = [float(x) for x in re.findall(r'c?x="([-\d.]+)"', pareto)]
    assert all(0 <= x <= 720 for x in inside)


def test_axes_have_round_ticks() -> None:
    assert [nice(v) for v in (0.3, 1.1, 4.9, 5.1, 70)] == pytest.approx([0.5, 2, 5, 10, 100])
    assert [tick_text(t) for t in Axis.over("", [0, 9.3]).ticks()] == ["0", "5", "10"]
    assert Axis.over("", [1, 32], "log2").ticks() == [1, 2, 4, 8, 16, 32]
    assert Axis.over("", [1, 1], "log2").at(1) == 0.5
    assert Axis("", 0, 10).at(5) == 0.5


def test_documents_for_other_programs(box: Any, rig: Any) -> None:
    text = formats.llama_bench_markdown([box])
    assert "| metronome native | in process | pp100 | 1000.00 ± 0.00 |" in text
    assert "| tg50 @ d100 | 100.00 ± 0.00 |" in text
    tests = json.loads(formats.llama_bench_json([box, rig]))
    assert [(test["n_prompt"], test["n_gen"]) for test in tests] == [(100, 0), (0, 50)] * 2
    assert tests[1]["avg_ts"] == pytest.approx(100)
    rows = list(csv.DictReader(io.StringIO(formats.as_csv(rows_of([box, rig])))))
    assert len(rows) == 4
    assert float(rows[0]["watts"]) == pytest.approx(200)
    assert rows[0]["scope"] == "chip"
    assert "| box | " in document(rows_of([box, rig]), [box, rig])


def test_numbers_as_people_read_them() -> None:
    shown = [number(v) for v in (None, 0, 1234567.0, 123.4, 1.2345, 0.0012345, 9.999)]
    assert shown == ["-", "0", "1,234,567", "123", "1.23", "0.00123", "10.0"]
    assert [dollars(v) for v in (None, 4700.0, 0.1, 0.00123)] == [
        "-",
        "$4,700.00",
        "$0.10",
        "$0.0012",
    ]


# the article


def test_the_articles_table_follows_from_its_inputs_and_says_what_does_not() -> None:
    given, per_dollar, even = article.tables()
    assert [row[1:5] for row in given.rows] == [
        ["30.0", "105", "$4,700.00", "0.286"],
        ["75.0", "950", "$6,500.00", "0.0789"],
    ]
    assert "3.62 times" in given.notes[0]
    assert "rig makes 1.81 times" in given.notes[1]
    by_duty = {row[0]: row[1:] for row in per_dollar.rows}
    # 5 years at all hours: 4.73e9 tokens for $4,700 + 105 W x 43,800 h x $0.20, and the rig's
    assert by_duty["100%"][2] == "0.842 / 0.798 Mac"
    assert by_duty["25%"][2].endswith("rig")
    assert "does not follow" in per_dollar.notes[1]
    assert even.rows[3] == ["100%", "$0.17"]
    assert even_tariff((10, 10, 100), (10, 10, 200), 1.0) is None


# the command


def test_the_command_writes_everything(
    box: Any, rig: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(*words: str) -> str:
        app(list(words), standalone_mode=False)
        return capsys.readouterr().out

    paths = []
    for one in box, rig:
        paths.append(str(tmp_path / f"{one['label']}.json"))
        Path(paths[-1]).write_text(json.dumps(one))
    files = {name: tmp_path / f"out.{name}" for name in ("html", "markdown", "csv")}
    options = [part for name, path in files.items() for part in (f"--{name}", str(path))]
    text = run("compare", *paths, *options, "--price", "box=100", "--tariff", "0.3")
    assert "box makes 2.00 times as many tokens a joule as rig" in text
    assert files["html"].read_text().startswith("<!doctype html>")
    assert files["markdown"].read_text().startswith("# Comparison")
    assert files["csv"].read_text().startswith("machine,")
    assert "$100.00" in text
    assert run("compare", *paths, "--llama-bench", "md").startswith("| model |")
    assert json.loads(run("compare", "--article", "--json"))["tables"][0]["rows"]
    assert "The article's inputs" in run("compare", "--article")
