"""`ds4 bench` from end to end: one workload file for our engine and for somebody else's server."""

import json
import time
from pathlib import Path
from typing import Any

import pytest
import typer

from ds4.bench import compare as comparing
from ds4.bench.environment import command
from ds4.bench.opening import MATRIX
from ds4.bench.quality import measured, note
from ds4.cli import app
from ds4.errors import BenchError, PowerError
from tests.stand_in_server import StandIn

WORKLOADS = """
[[workload]]
name = "small"
prompt_tokens = 12
output_tokens = 3
concurrency = [2]
requests = 2
seconds = 0
most_seconds = 60
"""
MODEL = "tiny (random weights)"
FAST = "--quick", "--idle", "0", "--warm", "0", "--power", "none"


@pytest.fixture
def workloads(tmp_path: Path) -> str:
    file = tmp_path / "small.toml"
    file.write_text(WORKLOADS)
    return str(file)


@pytest.fixture
def bench(tmp_path: Path, workloads: str, capsys: pytest.CaptureFixture[str]) -> Any:
    def run(*words: str) -> tuple[dict[str, Any], str]:
        out = tmp_path / "out.json"
        app(["bench", str(out), "-w", workloads, *FAST, *words], standalone_mode=False)
        return json.loads(out.read_text()), capsys.readouterr().out

    return run


def test_the_engine_and_a_peer_run_the_same_file(bench: Any, tmp_path: Path) -> None:
    tiny = "--synthetic", "tiny", "--backend", "reference", "--recipe", "native,q2"
    ours, said = bench(*tiny, "--label", "ours")
    assert [target["recipe"] for target in ours["targets"]] == ["native", "q2"]
    assert ours["targets"][0]["usage"]["memory"]["host"] > 1e6
    assert ours["targets"][0]["slots"] == 2
    assert "no meter: energy is not known" in said
    assert "experts 2.33 bits" in said
    with StandIn().serve() as url:
        theirs, _ = bench("--url", url, "--recipe", "q2", "--label", "theirs", "--name", MODEL)
    assert theirs["targets"][0]["model"] == ours["targets"][0]["model"] == MODEL
    (tables,) = [
        table.rows
        for table in comparing.tables(comparing.rows_of([ours, theirs]))
        if "q2" in table.title
    ]
    assert [row[0] for row in tables] == ["ours", "theirs"]
    keys = [{one["key"] for one in results["workloads"]} for results in (ours, theirs)]
    assert keys[0] == keys[1]
    for results in ours, theirs:
        for row in results["summary"]:
            assert row["figures"]["failed"] == 0
            assert row["figures"]["mean_output_tokens"] == 3
            assert row["energy"] == {}


def test_a_meters_log_is_read_at_the_end_and_cannot_cost_the_measurement(
    bench: Any, tmp_path: Path
) -> None:
    log, lost = tmp_path / "log.csv", tmp_path / "lost.csv"
    start = time.time()
    log.write_text("time,watts\n" + "\n".join(f"{start + i},50" for i in range(-60, 600)))
    files = "--power", f"csv:{log}", "--power", f"csv:{lost}"
    with StandIn(delay_s=0.001).serve() as url:
        found, _ = bench("--url", url, *files)
    assert [source["name"] for source in found["power"]["sources"]] == ["csv:log.csv"]
    assert "lost.csv" in found["power"]["absent"][0]
    wall = found["summary"][0]["energy"]["wall"]
    assert wall["watts"] == pytest.approx(50)
    assert not wall["power_valid"]  # so short a window has too few of its readings
    assert found["power"]["whole"][0]["integral_j"] > 0


def test_wrong_options_fail_before_anything_is_loaded(bench: Any, tmp_path: Path) -> None:
    with pytest.raises(typer.BadParameter, match="no folder"):
        app(["bench", str(tmp_path / "none" / "a.json")], standalone_mode=False)
    with pytest.raises(typer.BadParameter, match="a server has one model"):
        bench("--url", "http://127.0.0.1:9", "--matrix")
    with pytest.raises(BenchError, match="duty"):
        bench("--duty", "2")
    with pytest.raises(BenchError, match="no workload is called large: small@2"):
        bench("--only", "large")
    with pytest.raises(PowerError, match="no source of power is called 'meter'"):
        bench("--power", "meter")


def test_outputs_are_tried_before_anything_is_measured(bench: Any, tmp_path: Path) -> None:
    file, no_server = tmp_path / "file", ("--url", "http://127.0.0.1:9")
    file.touch()
    wrong = [("OUT", tmp_path, "Is a dir"), ("OUT", tmp_path / ("x" * 255), "name too long")]
    wrong += [("--calibrate", tmp_path, "Is a directory"), ("--calibrate", file / "a", "no folder")]
    wrong += [("--folder", path, "Not a directory") for path in (file, file / "a" / "b")]
    for option, path, said in wrong:
        words = ["bench", str(path if option == "OUT" else tmp_path / "out.json"), *no_server]
        words += [] if option == "OUT" else [option, str(path)]
        with pytest.raises(typer.BadParameter, match=said) as caught:
            app(words, standalone_mode=False)
        assert caught.value.param_hint == option
    with pytest.raises(BenchError, match="9"):
        bench(*no_server, "--folder", str(tmp_path / "new" / "folder"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "small.toml"]


def test_a_matrix_is_of_the_recipes_that_are_named(bench: Any, tmp_path: Path) -> None:
    random = "--synthetic", "tiny", "--backend", "reference"
    for words in (*random, "--recipe", "q9"), ("--matrix", "--recipe", "q9"), ("-r", "q2,q9"):
        with pytest.raises(typer.BadParameter, match="no recipe is called 'q9'"):
            bench(*words)
    found, _ = bench(*random, "--matrix", "--recipe", "q4_K_M")
    assert [target["recipe"] for target in found["targets"]] == ["q4_K_M"]


def test_a_matrix_makes_even_one_recipe(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def opened(model: str, recipe: str, *about: Any, **how: Any) -> Any:
        raise BenchError(f"{recipe} from {model}")

    monkeypatch.setattr("ds4.bench.opening.open_engine", opened)
    monkeypatch.setattr("ds4.quant.quantize.quantize_checkpoint", lambda *given: None)
    words = ["bench", str(tmp_path / "out.json"), *FAST, "--recipe", "q2", "--folder"]
    for more, model in ([str(tmp_path), "--matrix"], tmp_path / "q2"), ([str(tmp_path)], "demo"):
        with pytest.raises(BenchError, match=f"q2 from {model}"):
            app([*words, *more], standalone_mode=False)


def test_recipes_say_what_they_keep(tmp_path: Path) -> None:
    assert MATRIX[0] == "native"
    assert note("native") == "weights as shipped"
    assert "experts 4.25 bits (as shipped)" in note("q4_K_M")
    assert note("theirs") == "unknown"
    row = {"recipe": "q2", "kl": 0.5, "kl_error": 0.01, "top1": 0.75}
    file = tmp_path / "ladder.json"
    file.write_text(json.dumps({"text": "a book", "recipes": [row, row | {"kl": 0.25}]}))
    assert measured(file) == {"q2": "KL 0.2500 ± 0.0100, top-1 75.0% on a book"}
    file.write_text("[]")
    with pytest.raises(BenchError, match="not the JSON of ds4 eval"):
        measured(file)


def test_a_key_is_not_kept_in_results() -> None:
    words = ["bench", "--api-key", "secret", "--api-key=secret", "--label", "my box"]
    assert command(words) == "ds4 bench --api-key '***' '--api-key=***' --label 'my box'"
