"""The command line, with a model that only pretends: tests/fake_llm.py."""

import inspect
import io
import json
import subprocess
import sys
from dataclasses import replace

import pytest

import ds4
from ds4.cli import main
from ds4.cli.chat import chat
from ds4.cli.generate import generate
from ds4.errors import BackendError
from tests.fake_llm import FakeLLM


@pytest.fixture
def llm(monkeypatch):
    """The model that every command loads; `llm.loaded` is what it was asked to load."""
    fake = FakeLLM()

    def load(*args, **kwargs):
        fake.loaded = args
        return fake

    monkeypatch.setattr(ds4, "load", load)
    return fake


@pytest.fixture
def run(monkeypatch, capsys):
    """Runs a command line in this process: (status, standard output, standard error)."""

    def run(*arguments, stdin=b""):
        monkeypatch.setattr(sys, "argv", ["ds4", *arguments])
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin), encoding="utf-8"))
        with pytest.raises(SystemExit) as end:
            main()
        output = capsys.readouterr()
        return end.value.code or 0, output.out, output.err

    return run


def one_error(result):
    """The one line that an error is."""
    status, out, err = result
    assert (status, out) == (1, "")
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    return err.strip()


# The whole


def test_help_and_version(run):
    status, out, err = run("--help")
    assert (status, err) == (0, "")
    assert all(name in out for name in ("generate", "chat", "doctor"))
    assert run("--version") == (0, f"ds4 {ds4.__version__}\n", "")


def test_help_imports_nothing_heavy():
    heavy = "torch", "mlx", "transformers", "triton", "prompt_toolkit"
    code = f"import sys, ds4.cli; print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True)
    assert done.stdout == b"[]\n"


@pytest.mark.parametrize(
    "arguments",
    [
        ["explode"],
        ["generate", "--no-such-option"],
        ["generate", "x", "--cache", "lossy"],
        ["generate", "x", "--context", "0"],
        ["generate", "x", "--file", "y"],
        ["generate", "x", "--logprobs", "2"],
        ["generate", "x", "--think", "high"],
    ],
)
def test_wrong_usage_is_status_2(run, llm, arguments):
    status, out, err = run(*arguments)
    assert (status, out) == (2, "")
    assert "Traceback" not in err


def test_any_ds4_error_is_one_line(run, monkeypatch):
    def fail(*args, **kwargs):
        raise BackendError("no such\nbackend")

    monkeypatch.setattr(ds4, "load", fail)
    assert one_error(run("generate", "x")) == "error: no such backend"
    assert one_error(run("chat")) == "error: no such backend"


def test_every_sampling_parameter_is_an_option_left_to_the_model():
    fields = set(vars(ds4.SamplingParams())) - {"max_tokens", "logit_bias", "logprobs", "stop_ids"}
    for command in (generate, chat):
        parameters = inspect.signature(command).parameters
        assert fields <= set(parameters)
        assert all(parameters[name].default is None for name in fields)


# generate


def test_text_of_an_argument_goes_to_standard_output(run, llm):
    assert run("generate", "Once upon") == (0, "One two three.\n", "")
    prompt, options = llm.requests[0]
    assert prompt == "Once upon"
    assert options == {"max_tokens": 256, "thinking": "off"}
    assert llm.loaded == ("demo", "auto", "auto", "native", None)


def test_the_line_is_ended(run, llm):
    llm.words = "no line end"
    assert run("generate", "x")[1] == "no line end\n"


def test_prompts_from_files_and_pipes(run, llm, tmp_path):
    file = tmp_path / "prompt.txt"
    file.write_bytes("Größe\n\n".encode())
    run("generate", "--file", str(file))
    run("generate", "-", stdin=b"piped\n")
    run("generate", stdin="日本".encode())
    run("generate", "")
    prompts = [prompt for prompt, _ in llm.requests]
    assert prompts == ["Größe\n", "piped", "日本", ""]


def test_options_arrive(run, llm):
    run("generate", "x", "--stop", "a", "--stop", "b", "--top-k", "3", "--seed", "7", "-n", "5")
    _, options = llm.requests[0]
    got = [options[name] for name in ("stop", "top_k", "seed", "max_tokens")]
    assert got == [("a", "b"), 3, 7, 5]
    run("generate", "x", "-m", "folder", "-b", "mlx", "--device", "cpu", "--cache", "exact")
    assert llm.loaded == ("folder", "mlx", "cpu", "exact", None)


def test_json_is_one_object(run, llm):
    status, out, err = run("generate", "x", "--json", "--logprobs", "2")
    assert (status, err) == (0, "")
    report = json.loads(out)
    assert report["text"] == "One two three.\n"
    assert (report["tokens"], report["finish_reason"]) == ([10, 11, 12], "stop")
    assert report["usage"]["total_tokens"] == 5
    assert report["timings"]["decode_tok_s"] == 10
    assert (report["model"], report["backend"], report["device"]) == ("demo", "fake", "cpu")
    assert report["cache"] == "native"
    top = {"token": 11, "text": "<11>", "logprob": -1.5}
    assert report["logprobs"][0]["top"][1] == top


def test_an_answer_with_reasoning(run, llm):
    llm.words = "Hm hm.</think>Four."
    arguments = "generate", "2+2?", "--chat", "--think", "high"
    assert run(*arguments)[1] == "Four.\n"
    report = json.loads(run(*arguments, "--json")[1])
    assert (report["reasoning"], report["content"]) == ("Hm hm.", "Four.")
    prompt, options = llm.requests[0]
    assert prompt == [{"role": "user", "content": "2+2?"}]
    assert options["thinking"] == "high"


def test_what_cannot_be_a_prompt(run, llm, tmp_path):
    file = tmp_path / "prompt.txt"
    file.write_bytes(b"abc\xff")
    assert "prompt.txt is not UTF-8 text: see byte 3 (0xff)" in one_error(
        run("generate", "--file", str(file))
    )
    missing = one_error(run("generate", "--file", str(tmp_path / "none")))
    assert missing.endswith("none: cannot be read: No such file or directory")
    assert one_error(run("generate", "--file", str(tmp_path))).endswith("Is a directory")
    text = one_error(run("generate", stdin=b"ok\n\xc3("))
    assert text == "error: standard input is not UTF-8 text: see byte 3 (0xc3)"
    assert one_error(run("generate")) == "error: standard input is empty"
    text = one_error(run("generate", "a\udcff"))
    assert text == "error: the prompt is not UTF-8 text: see byte 1 (0xff)"


def test_a_wrong_number_fails_before_the_model_is_loaded(run, llm):
    assert "temperature" in one_error(run("generate", "x", "--temperature", "-1"))
    assert not hasattr(llm, "loaded")


# chat


def test_a_conversation_through_a_pipe(run, llm):
    status, out, err = run("chat", "--system", "Be brief.", stdin=b"Hi\n\nAgain\n/quit\nno")
    assert (status, out, err) == (0, "One two three.\n" * 2, "")
    assert [prompt for prompt, _ in llm.requests] == [
        [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}],
        [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "Hi"},
            {"role": "assistant", "content": "One two three.\n"},
            {"role": "user", "content": "Again"},
        ],
    ]


def test_commands(run, llm, tmp_path):
    file = tmp_path / "a file.txt"
    file.write_text("from a file\n")
    lines = f"/help\n/think\nHi\n/think max\n/clear\n/read {file}\n/nothink\n /Hi\n"
    status, _, err = run("chat", stdin=lines.encode())
    assert status == 0
    assert "/read FILE" in err
    assert [options["thinking"] for _, options in llm.requests] == ["high", "max", "off"]
    prompts = [prompt for prompt, _ in llm.requests]
    assert prompts[1] == [{"role": "user", "content": "from a file"}]
    assert prompts[2][-1]["content"] == " /Hi"


def test_what_was_said_before_ctrl_c_is_remembered(run, llm):
    status, out, err = run("chat", stdin=b"interrupt\nGo on")
    assert (status, out, err) == (0, "One two\nOne two three.\n", "(stopped)\n")
    assert llm.requests[1][0] == [
        {"role": "user", "content": "interrupt"},
        {"role": "assistant", "content": "One two"},
        {"role": "user", "content": "Go on"},
    ]


def test_ctrl_c_in_generate(run, llm):
    assert run("generate", "interrupt") == (130, "One\n", "")
    assert run("generate", "interrupt", "--json") == (130, "", "")


def test_reasoning_is_remembered_apart(run, llm):
    llm.words = "Hm.</think>Four."
    assert run("chat", "--think", "high", stdin=b"2+2?\nSure?")[1] == "Four.\nFour.\n"
    answer = llm.requests[1][0][1]
    assert answer == {"role": "assistant", "content": "Four.", "reasoning_content": "Hm."}


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"/fly", "no command /fly: /help lists them"),
        (b"/think hard", "/think takes low, high or max, not hard"),
        (b"/read /no/such/file", "/no/such/file: cannot be read: No such file or directory"),
        (b"a\xff", "line 1 of standard input is not UTF-8 text: see byte 1 (0xff)"),
        (b"x" * 1000, "the context of 1000 is too short"),
    ],
)
def test_a_bad_line_does_not_end_the_talk(run, llm, line, message):
    status, out, err = run("chat", stdin=line + b"\nHi")
    assert (status, out, err) == (1, "One two three.\n", f"error: {message}\n")
    assert llm.requests[-1][0] == [{"role": "user", "content": "Hi"}]


def test_a_full_context_says_so(run, llm, monkeypatch):
    llm.context = 5
    monkeypatch.setattr(llm, "stream", lambda *a, **k: _cut_off(llm._pieces("")))
    assert "(the context of 5 tokens is full: /clear starts anew)" in run("chat", stdin=b"x")[2]
    llm.context = 6
    assert "(stopped after 3 tokens: --max-tokens)" in run("chat", stdin=b"x")[2]


def _cut_off(pieces):
    for piece in pieces:
        whole = piece.generation and replace(piece.generation, finish_reason="length")
        yield replace(piece, generation=whole)
