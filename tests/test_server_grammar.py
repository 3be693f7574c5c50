"""Grammars admit exactly the answers that a request's form allows."""

import json

import llguidance
import numpy as np
import pytest
from llguidance.numpy import allocate_token_bitmask, fill_next_token_bitmask

from ds4.engine.api import Grammar
from ds4.server.errors import ApiError
from ds4.server.grammar import Format, Shape, Tool, build, json_schema
from ds4.server.schema import GrammarCheck, check_schema
from tests.serving import TOKENIZER

D = "｜DSML｜"
SCHEMA = {
    "type": "object",
    "properties": {
        "place": {"type": "string"},
        "days": {"type": "integer"},
        "unit": {"enum": ["c", "f", None]},
        "tags": {"anyOf": [{"type": "string"}, {"type": "array", "items": {"$ref": "#/$defs/n"}}]},
        "day": {"type": "string", "pattern": "^[0-9]{2}$"},
    },
    "required": ["place", "days"],
    "additionalProperties": False,
    "$defs": {"n": {"type": "integer"}},
}
TOOLS = (Tool("weather", SCHEMA, True), Tool("any", {}), Tool("none", {"properties": {}}, True))
GOOD = [("place", "true", 'A </ "x"\n<b>'), ("days", "false", "3")]


def call(name, *parameters):
    inner = "".join(
        f'<{D}parameter name="{n}" string="{s}">{v}</{D}parameter>\n' for n, s, v in parameters
    )
    return f'<{D}invoke name="{name}">\n{inner}</{D}invoke>\n'


def block(*calls):
    return f"\n\n<{D}tool_calls>\n{''.join(calls)}</{D}tool_calls>"


class Vocabulary:
    eos_token_id, bos_token_id = TOKENIZER.eos_id, TOKENIZER.bos_id
    tokens = [TOKENIZER.token_bytes(token) for token in range(TOKENIZER.size)]  # noqa: RUF012

    def __init__(self, special):
        self.special_token_ids = special

    def __call__(self, text):
        return TOKENIZER.encode(text.decode())


CONTROL = [
    n for n, text in enumerate(Vocabulary.tokens) if b"\xef\xbd\x9c" in text or b"think" in text
]


@pytest.fixture(scope="module", params=["marked", "unmarked"])
def words(request):
    """A tokenizer that marks its control tokens as special, and one that does not."""
    special = CONTROL if request.param == "marked" else [TOKENIZER.eos_id]
    return llguidance.LLTokenizer(llguidance.TokenizerWrapper(Vocabulary(special)))


def admits(words, grammar, text):
    """Whether every token of `text`, and the end after it, is in the mask in its turn."""
    kinds = {
        "lark": llguidance.LLMatcher.grammar_from_lark,
        "regex": llguidance.LLMatcher.grammar_from_regex,
        "json_schema": llguidance.LLMatcher.grammar_from_json_schema,
    }
    matcher = llguidance.LLMatcher(words, kinds[grammar.kind](grammar.text), log_level=0)
    assert not matcher.is_error(), matcher.get_error()
    mask = allocate_token_bitmask(1, words.vocab_size)
    for token in [*TOKENIZER.encode_with_specials(text), TOKENIZER.eos_id]:
        fill_next_token_bitmask(matcher, mask, 0)
        if not mask[0].view(np.uint32)[token // 32] >> (token % 32) & 1:
            return False
        matcher.consume_token(token)
    return True


@pytest.mark.parametrize("thinks", [True, False])
def test_strict_tools(words, thinks):
    grammar = build(Shape(tools=TOOLS, thinks=thinks), TOKENIZER)
    thought = "so </ <it> goes</think>" if thinks else ""
    good = [
        "Free text <b>\n\n",
        "Well." + block(call("weather", *GOOD)),
        block(call("weather", *GOOD), call("none")),
        block(call("weather", *GOOD, ("unit", "true", "c"), ("tags", "false", "[1, 2]"))),
        block(call("weather", *GOOD, ("unit", "false", "null"), ("day", "false", '"07"'))),
        block(call("any", ("q w", "true", "x"), ("z", "false", '{"a": null}'))),
    ]
    bad = [
        block(call("weather", GOOD[0])),
        block(call("weather", GOOD[0], ("days", "true", "3"))),
        block(call("weather", GOOD[0], ("days", "false", "three"))),
        block(call("weather", *GOOD, ("unit", "true", "k"))),
        block(call("weather", *GOOD, ("tags", "false", '["a"]'))),
        block(call("weather", *GOOD, ("day", "false", '"7"'))),
        block(call("other")),
        block(call("none", ("a", "true", "b"))),
        block(),
    ]
    assert [text for text in good if not admits(words, grammar, thought + text)] == []
    assert [text for text in bad if admits(words, grammar, thought + text)] == []


def test_a_call_that_must_come(words):
    shape = Shape(tools=TOOLS[:1], required=True, parallel=False, thinks=True)
    grammar = build(shape, TOKENIZER)
    one = call("weather", *GOOD)
    assert admits(words, grammar, "hm</think>" + block(one))
    assert not admits(words, grammar, "hm</think>" + block(one, one))
    assert not admits(words, grammar, "hm</think>Hello")
    assert not admits(words, grammar, "hm")


@pytest.mark.parametrize("thinks", [True, False])
@pytest.mark.parametrize(
    ("form", "good", "bad"),
    [
        (Format("regex", r"[a-c]+/\d{2}"), "ab/12", "ab/1"),
        (Format("regex", r"//\/\\/x"), r"///\/x", "///x"),
        (
            Format("json_schema", json_schema(SCHEMA)),
            '{"place": "x",\n  "days": 3}',
            '{"place": "x"}',
        ),
        (Format("json_schema", json_schema(SCHEMA)), '{"place":"x","days":3}', '{   "place":"x"'),
    ],
)
def test_formats(words, form, good, bad, thinks):
    grammar = build(Shape(format=form, thinks=thinks), TOKENIZER)
    thought = "hm</think>" if thinks else ""
    assert admits(words, grammar, thought + good)
    assert not admits(words, grammar, thought + bad)
    if not thinks:
        return
    both = build(Shape(format=form, tools=TOOLS, thinks=True), TOKENIZER)
    assert admits(words, both, thought + good)
    assert admits(words, both, thought + block(call("none")))


@pytest.mark.parametrize(
    "schema",
    [
        {"enum": list(range(10_001))},
        {"type": "string", "pattern": "a" * 1025},
        {"description": "x" * (256 << 10)},
        json.loads('{"a":' * 70 + "{}" + "}" * 70),
    ],
)
def test_schemas_are_bounded(schema):
    with pytest.raises(ApiError):
        check_schema(schema, "it")


def test_a_schema_that_grows_in_the_grammar_is_bounded():
    shared = {"$defs": {"n": {"description": "x" * 10_000}}}
    parameters = {"properties": {f"p{n}": {"$ref": "#/$defs/n"} for n in range(100)}, **shared}
    with pytest.raises(ApiError):
        build(Shape(tools=[Tool("f", parameters, True)]), TOKENIZER)


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        ("regex", "(a"),
        ("json_schema", '{"$ref": "#/$defs/none"}'),
        ("json_schema", '{"type": "string", "pattern": "("}'),
        ("lark", "start: nothing"),
    ],
)
def test_grammars_that_do_not_compile_are_told(kind, text):
    check = GrammarCheck()
    assert check.problem(Grammar(kind, text))
    assert check.problem(Grammar("regex", "a+")) is None
    assert check.problem(Grammar("regex", "a+")) is None
