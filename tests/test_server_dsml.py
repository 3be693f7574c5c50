"""Tool calls as models write them, well and badly, become calls with valid arguments."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ds4.server.dsml import END_CALLS, END_INVOKE, DsmlRepair
from ds4.server.grammar import Tool
from ds4.server.tools import Parameters

D = "｜DSML｜"
START = f"{D}tool_calls>\n"
OPEN = START + f'<{D}invoke name="f">\n'


def invoke(name="f", *parameters):
    return f'<{D}invoke name="{name}">\n' + "".join(parameters) + END_INVOKE + "\n"


def parameter(name, string, value):
    return f'<{D}parameter name="{name}" string="{string}">{value}</{D}parameter>\n'


def repaired(text, parts=1, **options):
    """`text` pushed in pieces of `parts` characters, then closed."""
    repair = DsmlRepair(**options)
    found = [repair.push(text[at : at + parts]) for at in range(0, len(text), parts)]
    return "".join(found) + repair.close(), repair


GOOD = (
    START
    + invoke("f", parameter("a", "true", 'x </ "y'), parameter("b", "false", "[1]"))
    + END_CALLS
)


@pytest.mark.parametrize("parts", [1, 5, 1000])
def test_what_is_well_written_passes_unchanged(parts):
    text, repair = repaired(GOOD + "more", parts)
    assert text == GOOD
    assert repair.ended
    assert not repair.cut


@pytest.mark.parametrize(
    ("bad", "good"),
    [
        (parameter("a", "false", "two"), parameter("a", "true", "two")),
        (parameter("a", "false", "NaN"), parameter("a", "true", "NaN")),
        (parameter("a", "false", "{'b': 1}"), parameter("a", "true", "{'b': 1}")),
        (parameter('a"b\\', "true", "x"), parameter('a\\"b\\\\', "true", "x")),
        (parameter("a>b", "true", "x"), parameter("a>b", "true", "x")),
        (f'<{D}parameter name="a">x</{D}parameter>\n', parameter("a", "true", "x")),
        (f"<{D}parameter a=1>x</{D}parameter>\n", "\n"),
    ],
)
def test_what_would_break_json_is_mended(bad, good):
    for parts in (1, 1000):
        text, _ = repaired(START + invoke("f", bad) + END_CALLS, parts)
        assert text == START + invoke("f", good) + END_CALLS


@pytest.mark.parametrize(
    ("name", "string", "value", "marked"),
    [
        ("number", "true", "3", "false"),
        ("number", "true", "three", "true"),
        ("flag", "true", "true", "false"),
        ("either", "true", "3", "true"),
        ("either", "false", "3", "false"),
        ("text", "false", "3", "true"),
        ("text", "false", '"x"', "false"),
        ("choice", "false", "12", "true"),
        ("maybe", "true", "null", "true"),
        ("other", "true", "3", "true"),
    ],
)
def test_values_are_marked_as_the_schema_wants_them(name, string, value, marked):
    schema = {
        "number": {"$ref": "#/$defs/n"},
        "flag": {"type": ["boolean", "null"]},
        "either": {"anyOf": [{"type": "string"}, {"type": "integer"}]},
        "text": {"type": "string"},
        "choice": {"enum": ["12", "13"]},
        "maybe": {"type": ["string", "null"]},
    }
    whole = {"type": "object", "properties": schema, "$defs": {"n": {"type": "number"}}}
    takes = Parameters([Tool("f", whole)])
    text, _ = repaired(OPEN + parameter(name, string, value) + END_INVOKE, takes=takes)
    assert text == OPEN + parameter(name, marked, value) + END_INVOKE


@pytest.mark.parametrize(
    ("cut", "kept"),
    [
        (OPEN + parameter("a", "true", "xyz")[:-5], parameter("a", "true", "xyz")),
        (OPEN + parameter("b", "false", "[1, 2]")[:-22], ""),
        (OPEN + f"<{D}para", ""),
    ],
)
def test_a_call_that_was_cut_off_is_closed(cut, kept):
    text, repair = repaired(cut)
    assert text.replace("\n", "") == (START + invoke("f", kept)).replace("\n", "")
    assert not repair.ended


def test_only_one_call_where_only_one_may_come():
    text, repair = repaired(START + invoke("f") + invoke("g") + END_CALLS, parallel=False)
    assert text == START + invoke("f") + END_CALLS
    assert repair.cut
    text, repair = repaired(START + invoke("f") + END_CALLS, parallel=False)
    assert text == START + invoke("f") + END_CALLS
    assert not repair.cut


def test_text_about_the_tag_is_no_call():
    assert repaired(f"{D} marks a call")[0] == f"{D} marks a call"


PIECES = (
    D,
    "<",
    "</",
    ">",
    '"',
    "\n",
    "invoke",
    'name="f"',
    "parameter",
    'string="false"',
    "{",
    "1",
)
TAGS = (
    *(END_CALLS, END_INVOKE, f'<{D}invoke name="f">', f"</{D}parameter>", "tool_calls", "\\"),
    *(f'<{D}parameter name="a" string="true">', f'<{D}parameter name="b" string="false">'),
)
tags = st.sampled_from((*PIECES, *TAGS))


@given(st.lists(tags | st.text(max_size=3), max_size=30), st.integers(1, 9))
def test_arguments_are_valid_json_whatever_comes(pieces, parts):
    """deepseek-recipe reads the repaired text as calls whose arguments are JSON objects."""
    import deepseek_recipe as recipe

    from ds4.server.dialect import MODEL, OPTIONS

    text, repair = repaired(OPEN + "".join(pieces), parts)
    body = {
        "model": MODEL,
        "messages": [{"role": "user", "content": "x"}],
        "tools": [{"type": "function", "function": {"name": "f"}}],
        "thinking": {"type": "disabled"},
    }
    converted = recipe.ChatCompletionRequest(body).convert(OPTIONS)
    generator = recipe.ChatCompletionRequest.chunk_generator(converted, "i", MODEL)
    processor = recipe.StreamProcessor(generator, converted.parsing_options, None)
    whole = recipe.ChatCompletionResponse("i", MODEL, 1, 1, 0)
    reasons = recipe.InferenceFinishReason
    chunks = [
        recipe.InferenceChunk.ready(prompt_usage=recipe.PromptUsage(prompt_tokens=1)),
        recipe.InferenceChunk.text("<" + text, 1),
        recipe.InferenceChunk.finish(reasons.Stop if repair.ended else reasons.Length),
    ]
    for chunk in chunks:
        for event in [] if processor.finished else processor.push(chunk):
            whole.accumulate(event)
    message = json.loads(whole.to_json())["choices"][0]["message"]
    for call in message.get("tool_calls") or ():
        assert isinstance(json.loads(call["function"]["arguments"]), dict)
