"""The command line with a model that computes: random weights, the demo's tokenizer."""

import io
import json
import shutil
import signal
import subprocess
import sys
from importlib import resources
from subprocess import PIPE

import pytest

from ds4.cli import main
from ds4.tokenizer import Tokenizer
from tests.fixtures import official_fixture

TOKENIZER = str(resources.files("ds4") / "demo" / "tokenizer.json")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "random"
    official_fixture(folder, vocab_size=4096)
    shutil.copy(TOKENIZER, folder)
    return folder


@pytest.fixture
def run(folder, monkeypatch, capsys):
    """Runs a command on that model: (status, standard output, standard error)."""

    def run(command, *arguments, stdin=b""):
        place = "--model", str(folder), "--backend", "reference"
        monkeypatch.setattr(sys, "argv", ["ds4", command, *place, *arguments])
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin), encoding="utf-8"))
        with pytest.raises(SystemExit) as end:
            main()
        output = capsys.readouterr()
        return end.value.code or 0, output.out, output.err

    return run


def test_json_says_what_was_written(run):
    options = "--temperature", "0", "-n", "12", "--logprobs", "2"
    status, out, err = run("generate", "Once upon", *options, "--json")
    assert (status, err) == (0, "")
    report = json.loads(out)
    assert report["text"] == Tokenizer.from_file(TOKENIZER).decode(report["tokens"])
    assert report["usage"]["completion_tokens"] == len(report["tokens"]) == 12
    assert report["finish_reason"] == "length"
    assert [entry["token"] for entry in report["logprobs"]] == report["tokens"]
    assert all(entry["top"][0]["token"] == entry["token"] for entry in report["logprobs"])
    text = run("generate", *options[:4], stdin=b"Once upon\n")[1]
    assert text.rstrip("\n") == report["text"].rstrip("\n")


def test_the_same_seed_writes_the_same_text(run):
    texts = [run("generate", "Once", "-n", "8", "--seed", seed)[1] for seed in ("1", "1", "2")]
    assert texts[0] == texts[1] != texts[2]


def test_a_stop_string_ends_the_text(run):
    text = json.loads(run("generate", "Once", "--seed", "1", "-n", "8", "--json")[1])["text"]
    report = run("generate", "Once", "--seed", "1", "-n", "8", "--json", "--stop", text[5:9])[1]
    report = json.loads(report)
    assert (report["text"], report["finish_reason"]) == (text[: text.index(text[5:9])], "stop")


def test_a_conversation(run):
    status, out, err = run("chat", "-n", "5", "--seed", "1", stdin=b"Hi\n/think\nAgain\n")
    assert status == 0
    assert err.count("(stopped after 5 tokens: --max-tokens)") == 2
    assert out.endswith("\n")


def test_a_full_context_and_a_new_conversation(run):
    lines = b"Hi\nOnce more, and with more words than that\n/clear\nHi\n"
    status, _, err = run("chat", "--context", "24", "-n", "10", stdin=lines)
    assert status == 1
    assert "error: the prompt has" in err
    assert err.endswith("(a new conversation)\n(stopped after 10 tokens: --max-tokens)\n")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["word " * 50, "--context", "20"], "the context of 20 "),
        (["x", "--context", "5000"], "context must be from 1 to 4096"),
        (["x", "--backend", "abacus"], "no backend is called 'abacus'"),
        (["x", "--model", "no-such-model"], "no model is called 'no-such-model'"),
        (["x", "--device", "cuda:9"], "cuda:9"),
        (["x", "--stop", ""], "stop must be strings that are not empty"),
        (["x", "--top-p", "2"], "top_p must be"),
    ],
)
def test_what_cannot_be_done_is_one_line(run, arguments, message):
    status, out, err = run("generate", *arguments)
    assert (status, out) == (1, "")
    assert err.startswith("error: ")
    assert message in err
    assert err.count("\n") == 1


def test_a_folder_without_a_tokenizer(run, folder, tmp_path):
    for file in ("config.json", "model.safetensors"):
        shutil.copy(folder / file, tmp_path)
    for command in ("generate", "chat"):
        status, _, err = run(command, "--model", str(tmp_path), stdin=b"x")
        assert status == 1
        assert str(tmp_path) in err
        assert "tokenizer.json" in err


def test_a_damaged_tokenizer(run, folder, tmp_path):
    shutil.copytree(folder, tmp_path / "copy")
    (tmp_path / "copy" / "tokenizer.json").write_text("{")
    status, _, err = run("generate", "x", "--model", str(tmp_path / "copy"))
    assert status == 1
    assert "tokenizer.json: not a usable tokenizer.json" in err


def test_ctrl_c(folder):
    command = [sys.executable, "-m", "ds4.cli", "generate", "x", "-b", "reference"]
    options = ["--model", str(folder), "-n", "4000"]
    with subprocess.Popen([*command, *options], stdout=PIPE, stderr=PIPE) as process:
        assert process.stdout.read(3)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (130, b"")
