"""Options that would do nothing, or that no machine can follow, are refused by their names."""

import json
import sys
from pathlib import Path

import pytest
import typer

import ds4
from ds4.cache import make_cache
from ds4.cli import app, main
from ds4.cli.options import Random
from ds4.errors import BenchError, ConfigError, Ds4Error, PromptError
from ds4.loader import Synthetic, load, load_synthetic
from ds4.server.settings import read_settings


def run(*words: str) -> None:
    app(list(words), standalone_mode=False)


@pytest.mark.parametrize(
    "command", [["generate", "x"], ["batch", "in", "out"], ["serve"]], ids=lambda words: words[0]
)
@pytest.mark.parametrize(
    ("options", "named", "said"),
    [
        (["--recipe", "q2"], "--recipe", "it needs --synthetic"),
        (["--unique-layers", "3"], "--unique-layers", "it needs --synthetic"),
        (["--routing", "skewed"], "--routing", "it needs --synthetic"),
        (["--synthetic", "tiny", "--model", "q2dir"], "--model", "not both"),
    ],
)
def test_options_of_random_weights(
    monkeypatch: pytest.MonkeyPatch, command: list[str], options: list[str], named: str, said: str
) -> None:
    monkeypatch.setattr(ds4, "load", lambda *a, **k: pytest.fail("a model was loaded"))
    monkeypatch.setattr("ds4.server.assembly.serve", lambda s: pytest.fail("it was served"))
    with pytest.raises(typer.BadParameter, match=said) as refused:
        run(*command, *options)
    assert refused.value.param_hint == named


def test_bench_takes_one_model(tmp_path: Path) -> None:
    out = str(tmp_path / "out.json")
    with pytest.raises(typer.BadParameter, match="not both"):
        run("bench", out, "--synthetic", "tiny", "--model", "q2dir")


def test_a_batch_of_random_weights_says_what_lacks(tmp_path: Path) -> None:
    body = {"model": "x", "messages": [{"role": "user", "content": "hi"}]}
    line = {"custom_id": "1", "method": "POST", "url": "/v1/chat/completions", "body": body}
    (tmp_path / "in").write_text(json.dumps(line))
    with pytest.raises(Ds4Error, match="a batch needs words: random weights in the shapes of tiny"):
        run("batch", str(tmp_path / "in"), str(tmp_path / "out"), "--synthetic", "tiny")


def test_a_recipe_names_results_of_bench() -> None:
    assert Random(recipe="q2").model() is None
    with pytest.raises(typer.BadParameter, match="it needs --synthetic"):
        Random(routing="skewed").model()
    assert Random("tiny", "q2").model("demo") == Synthetic("tiny", "q2")


@pytest.mark.parametrize(
    "options", [["--drain", "nan"], ["--drain", "-1"], ["--hang", "nan"], ["--hang", "inf"]]
)
def test_seconds_of_a_server(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], options: list[str]
) -> None:
    monkeypatch.setattr("ds4.server.assembly.serve", lambda s: pytest.fail("it was served"))
    monkeypatch.setattr(sys, "argv", ["ds4", "serve", *options])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 1
    said = f"error: {options[0]} must be a finite number above 0, not {float(options[1])}\n"
    assert capsys.readouterr().err == said


def test_seconds_of_a_servers_file_are_named_as_there(tmp_path: Path) -> None:
    file = tmp_path / "ds4.toml"
    file.write_text("drain_s = nan\n")
    with pytest.raises(ConfigError, match=r"ds4\.toml: drain_s must be a finite number above 0"):
        read_settings(file)


@pytest.mark.parametrize("option", ["--years", "--duty"])
def test_terms_of_compare(option: str) -> None:
    with pytest.raises(BenchError, match="must be above 0"):
        run("compare", "--article", option, "nan")


def test_a_price_that_is_no_number() -> None:
    with pytest.raises(typer.BadParameter, match="LABEL=DOLLARS"):
        run("compare", "--article", "--price", "box=nan")


@pytest.mark.parametrize("backend", ["reference", "torch"])
@pytest.mark.parametrize("slots", [10**12, 10**16, 10**20])
def test_more_slots_than_memory(backend: str, slots: int) -> None:
    with pytest.raises(Ds4Error) as refused:
        load("demo", backend, "cpu", slots=slots)
    said = f"{slots:,} slots of 4,096 tokens do not fit in memory: fewer --slots or a shorter "
    assert str(refused.value) == said + "--context"


def test_other_errors_of_a_cache_stay_what_they_are() -> None:
    class Broken:
        cache = "exact"

        def alloc(self, *args: int) -> None:
            raise ValueError("a bug")

    with pytest.raises(ValueError, match="a bug"):
        make_cache(Broken(), Synthetic("tiny").config(), 1, 8, 8)  # type: ignore[arg-type]


def test_random_weights_without_words_say_which_have_some() -> None:
    llm = load_synthetic(Synthetic("tiny"), "reference", context=64)
    with pytest.raises(PromptError, match=r"shapes of tiny have no tokenizer; --synthetic demo"):
        llm.generate("x")


def test_a_folder_to_make_has_a_name_in_utf8(tmp_path: Path) -> None:
    target = tmp_path / "t\udcff"
    with pytest.raises(typer.BadParameter, match=r"t.udcff': a name that is not UTF-8"):
        run("quantize", "demo", str(target), "--recipe", "q2")
    assert not target.exists()
