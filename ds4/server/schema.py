"""Schemas and grammars from requests: bounded, and tried before the engine sees them.

llguidance compiles lazily and within limits of its own; what it refuses here it would refuse in
the engine. The check runs in a thread, without the interpreter's lock.
"""

import json
import threading
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from typing import Any

import llguidance

from ..engine.api import Grammar
from .errors import ApiError

MAX_BYTES = 256 << 10
MAX_DEPTH = 64
MAX_ENUM = 10_000
MAX_PATTERN = 1 << 10
MAX_EXPRESSION = 16 << 10  # that an answer must match
REMEMBERED = 256  # grammars that passed, by their text's hash

# As in the engine's own defaults; spelled out so that an update of the library can't widen them.
LIMITS = llguidance.LLParserLimits(
    initial_lexer_fuel=1_000_000, max_grammar_size=500_000, verbose_errors=False
)


def check_schema(schema: Any, where: str) -> None:
    """Refuse a JSON schema, or a regular expression, that is too big to be worth a try."""
    expression = isinstance(schema, str)
    size = len(schema) if expression else len(json.dumps(schema))
    if size > (most := MAX_EXPRESSION if expression else MAX_BYTES):
        raise ApiError(400, f"{where} has {size} bytes: the most is {most}", param=where)
    for depth, part in _parts(schema):
        if depth > MAX_DEPTH:
            raise ApiError(400, f"{where} is nested deeper than {MAX_DEPTH} levels", param=where)
        if isinstance(part, Mapping):
            if isinstance(part.get("enum"), list) and len(part["enum"]) > MAX_ENUM:
                raise ApiError(400, f"{where} has an enum of over {MAX_ENUM} values", param=where)
            if isinstance(part.get("pattern"), str) and len(part["pattern"]) > MAX_PATTERN:
                raise ApiError(400, f"{where} has a pattern of over {MAX_PATTERN} bytes")


def _parts(value: Any) -> Iterator[tuple[int, Any]]:
    """Every object and list within `value`, with its depth; no recursion, whatever the depth."""
    left = [(0, value)]
    while left:
        depth, part = left.pop()
        yield depth, part
        if depth <= MAX_DEPTH and isinstance(part, Mapping | list):
            inner = part.values() if isinstance(part, Mapping) else part
            left += [(depth + 1, value) for value in inner if isinstance(value, Mapping | list)]


class GrammarCheck:
    """Says whether grammars compile. Safe to call from several threads."""

    def __init__(self) -> None:
        self._passed: OrderedDict[Grammar, None] = OrderedDict()
        self._lock = threading.Lock()

    def problem(self, grammar: Grammar) -> str | None:
        """What is wrong with a grammar, in a line, or None."""
        with self._lock:
            if grammar in self._passed:
                self._passed.move_to_end(grammar)
                return None
        try:
            text = _compiled(grammar)
        except ValueError as error:
            return _line(str(error))
        failed, messages = llguidance.LLMatcher.validate_grammar_with_warnings(text, limits=LIMITS)
        if failed:
            return _line(messages[0])
        with self._lock:
            self._passed[grammar] = None
            while len(self._passed) > REMEMBERED:
                self._passed.popitem(last=False)
        return None


def _compiled(grammar: Grammar) -> str:
    """llguidance's form of a grammar."""
    matcher = llguidance.LLMatcher
    if grammar.kind == "json_object":
        return matcher.grammar_from_json_schema('{"type": "object"}')
    if grammar.kind == "json_schema":
        return matcher.grammar_from_json_schema(grammar.text)
    if grammar.kind == "regex":
        return matcher.grammar_from_regex(grammar.text)
    return matcher.grammar_from_lark(grammar.text)


def _line(message: str) -> str:
    """The first line of the library's message, which may quote much of the grammar."""
    lines = [line for line in message.splitlines() if line.strip()]
    return lines[0][:300] if lines else "it cannot be compiled"
