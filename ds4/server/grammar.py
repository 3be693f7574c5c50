"""What an answer must look like, as a grammar for llguidance.

The engine applies a grammar from the first token it samples. Where the model thinks first, the
grammar begins with free text that ends at the token </think>. Control tokens are named by id,
`<[id]>`, which holds whether or not a tokenizer marks them as special; text never spells them.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from ..engine.api import Grammar
from ..tokenizer import Tokenizer
from .errors import ApiError

MAX_CHARACTERS = 256 << 10

DSML = "｜DSML｜"
THINK_END = "</think>"

FREE = "FREE: /(?s:.*)/"
BEFORE_TAG = "BEFORE_TAG: /(?s:.*)</"  # text, up to the "<" of a tag
_ESCAPE_OR_SLASH = re.compile(r"\\.|/", re.DOTALL)
SPACE = "( |\\n[ \\t]{0,64})?"
STRING_VALUE = "STRING_VALUE: /(?s:.*)<\\//"  # text, up to the "</" of a tag


@dataclass(frozen=True)
class Tool:
    """A function that the model may call. A strict one takes exactly what its schema allows."""

    name: str
    parameters: Mapping[str, Any]
    strict: bool = False


@dataclass(frozen=True)
class Format:
    """The form of an answer that is no tool call; `text` is of `json_schema`, or an expression."""

    kind: Literal["json_schema", "regex"]
    text: str


@dataclass(frozen=True)
class Shape:
    """All that constrains one answer.

    tools       those that may be called, if the grammar is to know them
    required    a call must come
    parallel    several calls may come
    thinks      the answer begins with a thought
    """

    format: Format | None = None
    tools: Sequence[Tool] = ()
    required: bool = False
    parallel: bool = True
    thinks: bool = False


def build(shape: Shape, tokenizer: Tokenizer) -> Grammar | None:
    """The grammar of a shape; None if anything may come. It is not checked yet.

    Raises ApiError if it would be too long.
    """
    if shape.format is None and not shape.tools:
        return None
    if not shape.tools and not shape.thinks:
        assert shape.format is not None
        return Grammar(shape.format.kind, shape.format.text)
    return Grammar("lark", _Lark(tokenizer).write(shape))


def json_schema(schema: Any, shared: Mapping[str, Any] | None = None) -> str:
    """A schema as the text that llguidance takes, with bounded space between the tokens of JSON.

    Raises ApiError for a schema that is no object: true allows what nobody wants, false nothing.
    """
    if not isinstance(schema, Mapping):
        raise ApiError(400, f"the schema must be an object, not {schema!r}")
    plain = {key: value for key, value in schema.items() if key != "x-guidance"}
    # A model that is held to JSON may write nothing but space for ever, where it may.
    options = {"x-guidance": {"whitespace_pattern": SPACE}}
    return json.dumps({**(shared or {}), **plain, **options}, ensure_ascii=False)


class _Lark:
    """Writes one grammar, rule by rule."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._size = 0
        self._rules: dict[str, str] = {}
        self._lexemes: dict[str, None] = {}  # a set that keeps its order

    def write(self, shape: Shape) -> str:
        start = body = self._body(shape)
        if shape.thinks:
            start = f"{self._lexeme(FREE)} {self._token(THINK_END)} body"
            self._rules["body"] = body
        self._rules = {"start": start, **self._rules}
        rules = (f"{name}: {rule}" for name, rule in self._rules.items())
        return "\n".join([*rules, *self._lexemes]) + "\n"

    def _body(self, shape: Shape) -> str:
        if not shape.tools:
            assert shape.format is not None
            return self._format(shape.format)
        calls = self._calls(shape)
        block = f'{self._token(DSML)} "tool_calls>\\n" {calls}'
        if shape.required:
            return f'"\\n\\n<" {block}'
        if shape.format is not None:
            return f'{self._format(shape.format)} | "\\n\\n<" {block}'
        return f"{self._lexeme(FREE)} | {self._lexeme(BEFORE_TAG)} {block}"

    def _format(self, form: Format) -> str:
        if form.kind == "regex":
            expression = _ESCAPE_OR_SLASH.sub(_escaped_slash, form.text)
            return self._lexeme("PATTERN: /" + expression.replace("\n", "\\n") + "/")
        return f"%json {form.text}"

    def _calls(self, shape: Shape) -> str:
        for n, tool in enumerate(shape.tools):
            head = self._opening(f"invoke name={_quoted(tool.name)}>\n")
            parameters = self._parameters(n, tool)
            self._rules[f"call_{n}"] = f"{head} {parameters} {self._closing('invoke>' + chr(10))}"
        self._rules["call"] = " | ".join(f"call_{n}" for n in range(len(shape.tools)))
        return f"{'call+' if shape.parallel else 'call'} {self._closing('tool_calls>')}"

    def _parameters(self, n: int, tool: Tool) -> str:
        """Those of the schema in its order; any at all where the schema does not list them."""
        schema = tool.parameters
        properties = schema.get("properties")
        if not isinstance(properties, Mapping) or not (properties or tool.strict):
            return f"{self._any_parameter()}*"
        shared = {key: schema[key] for key in ("$defs", "definitions") if key in schema}
        required = schema.get("required")
        required = required if isinstance(required, list) else []
        needed = frozenset(name for name in required if isinstance(name, str))
        written = []
        for k, (name, value) in enumerate(properties.items()):
            rule = f"p_{n}_{k}"
            self._rules[rule] = self._parameter(name, value, shared)
            written.append(rule if name in needed else f"{rule}?")
            self._grow(len(self._rules[rule]))
        return " ".join(written)

    def _grow(self, characters: int) -> None:
        """Definitions are repeated in each rule that may need them: a small schema can grow far."""
        self._size += characters
        if self._size > MAX_CHARACTERS:
            raise ApiError(400, f"the tools' schemas make a grammar of over {MAX_CHARACTERS} bytes")

    def _parameter(self, name: str, schema: Any, shared: Mapping[str, Any]) -> str:
        head = f"parameter name={_quoted(name)} string="
        choices = []
        for value in _values(schema, shared):
            if value is _TEXT:
                choices.append(self._opening(f'{head}"true">') + " " + self._text_end())
            elif isinstance(value, str):
                choices.append(self._opening(f'{head}"true">{value}') + " " + self._end())
            else:
                written = json_schema(value, shared)
                choices.append(self._opening(f'{head}"false">') + f" %json {written} {self._end()}")
        return " | ".join(choices)

    def _any_parameter(self) -> str:
        name = self._lexeme('NAME: /[^"<>\\n]+/')
        head = f"{self._opening('parameter name=' + chr(34))} {name}"
        text = f"{_literal(_AS_TEXT)} {self._text_end()}"
        other = f"{_literal(_AS_JSON)} %json {json_schema({})} {self._end()}"
        self._rules["any_parameter"] = f"{head} ({text} | {other})"
        return "any_parameter"

    def _opening(self, rest: str) -> str:
        return f'"<" {self._token(DSML)} {_literal(rest)}'

    def _closing(self, rest: str) -> str:
        return f'"</" {self._token(DSML)} {_literal(rest)}'

    def _end(self) -> str:
        return self._closing("parameter>\n")

    def _text_end(self) -> str:
        return (
            f"{self._lexeme(STRING_VALUE)} {self._token(DSML)} {_literal('parameter>' + chr(10))}"
        )

    def _token(self, text: str) -> str:
        return f"<[{self._tokenizer.token_id(text)}]>"

    def _lexeme(self, definition: str) -> str:
        self._lexemes[definition] = None
        return definition.partition(":")[0]


_AS_TEXT, _AS_JSON = '" string="true">', '" string="false">'


class _Text:
    """Any string, written as it is."""


_TEXT = _Text()


def _values(schema: Any, shared: Mapping[str, Any]) -> list[Any]:
    """The ways to write a value: _TEXT, one exact text, or a schema whose JSON is written."""
    if not isinstance(schema, Mapping):
        return [_TEXT, {}]
    schema = resolved(schema, shared)
    listed = [schema["const"]] if "const" in schema else schema.get("enum")
    if isinstance(listed, list) and listed:
        texts = [value for value in listed if isinstance(value, str)]
        others = [value for value in listed if not isinstance(value, str)]
        return [*texts, *([{"enum": others}] if others else [])]
    alternatives = schema.get("anyOf")
    if isinstance(alternatives, list) and alternatives:
        return [way for part in alternatives for way in _values(part, shared)]
    kinds = schema.get("type")
    kinds = kinds if isinstance(kinds, list) else [kinds]
    limited = {"pattern", "format", "minLength", "maxLength"} & set(schema)
    if "string" not in kinds:
        return [dict(schema)] if kinds != [None] or "$ref" in schema else [_TEXT, dict(schema)]
    others = [kind for kind in kinds if kind != "string"]
    # JSON where the string has a form to keep: only there llguidance can hold it to that.
    text = {**schema, "type": "string"} if limited else _TEXT
    return [text, *([{**schema, "type": others}] if others else [])]


def resolved(schema: Mapping[str, Any], shared: Mapping[str, Any]) -> Mapping[str, Any]:
    """What a plain reference into $defs points to, or the schema itself."""
    reference = schema.get("$ref")
    if isinstance(reference, str) and reference.count("/") == 2:
        _, section, name = reference.split("/")
        found = shared.get(section, {}).get(name) if isinstance(shared.get(section), dict) else None
        if isinstance(found, Mapping) and "$ref" not in found:
            return found
    return schema


def _escaped_slash(found: re.Match[str]) -> str:
    return "\\/" if found[0] == "/" else found[0]


def _quoted(text: str) -> str:
    return f'"{text}"'


def _literal(text: str) -> str:
    """A string of the grammar that matches `text`."""
    return json.dumps(text, ensure_ascii=False)
