"""Request bodies, valid, nearly valid and not at all, for the whole application (fuzz_target.py).

What may come back: an answer or a 4xx, in time. bench/fuzz_server.py runs this at length.
"""

import copy
import json
from typing import Any

from hypothesis import strategies as st

SCHEMA = {
    "type": "object",
    "properties": {"a": {"type": "string"}, "b": {"type": "array", "items": {"type": "integer"}}},
    "required": ["a"],
    "additionalProperties": False,
}
FUNCTION = {"name": "f", "description": "d", "parameters": SCHEMA, "strict": True}
CALL = {"id": "call_1", "type": "function", "function": {"name": "f", "arguments": '{"a": "x"}'}}
VALID = {
    "/v1/chat/completions": {
        "model": "m",
        "messages": [
            {"role": "developer", "content": "Be brief."},
            {"role": "user", "content": [{"type": "text", "text": "hi"}]},
            {"role": "assistant", "content": None, "reasoning_content": "r", "tool_calls": [CALL]},
            {"role": "tool", "tool_call_id": "call_1", "content": "ok"},
        ],
        "tools": [{"type": "function", "function": FUNCTION}],
        "tool_choice": {"type": "function", "function": {"name": "f"}},
        "response_format": {
            "type": "json_schema",
            "json_schema": {"name": "x", "strict": True, "schema": SCHEMA},
        },
        "max_tokens": 20,
        "max_completion_tokens": 20,
        "temperature": 0.5,
        "top_p": 0.9,
        "top_k": 5,
        "min_p": 0.1,
        "n": 2,
        "seed": 7,
        "stop": ["x", "yy"],
        "logprobs": True,
        "top_logprobs": 2,
        "presence_penalty": 0.5,
        "frequency_penalty": -0.5,
        "repetition_penalty": 1.1,
        "logit_bias": {"5": 1.5},
        "parallel_tool_calls": False,
        "reasoning_effort": "high",
        "thinking": {"type": "enabled"},
        "stream": True,
        "stream_options": {"include_usage": True},
    },
    "/v1/completions": {
        "model": "m",
        "prompt": ["hi", "there"],
        "max_tokens": 10,
        "n": 2,
        "best_of": 2,
        "echo": True,
        "logprobs": 2,
        "stop": "x",
        "seed": -3,
        "ignore_eos": True,
        "logit_bias": {"7": -5},
        "stream": True,
        "stream_options": {"include_usage": True},
    },
    "/v1/responses": {
        "model": "m",
        "instructions": "Be brief.",
        "input": [
            {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "hi"}]},
            {"type": "reasoning", "id": "r", "summary": [], "encrypted_content": "x"},
            {"type": "function_call", "call_id": "c", "name": "f", "arguments": "{}"},
            {"type": "function_call_output", "call_id": "c", "output": "ok"},
        ],
        "tools": [
            {"type": "function", **FUNCTION},
            {"type": "custom", "name": "apply_patch", "description": "d"},
            {"type": "web_search"},
        ],
        "tool_choice": {
            "type": "allowed_tools",
            "mode": "required",
            "tools": [{"type": "function", "name": "f"}],
        },
        "reasoning": {"effort": "low", "summary": "auto"},
        "text": {"format": {"type": "json_schema", "name": "x", "schema": SCHEMA}},
        "max_output_tokens": 20,
        "include": ["reasoning.encrypted_content"],
        "top_logprobs": 2,
        "parallel_tool_calls": False,
        "metadata": {"a": "b"},
        "store": True,
        "stream": True,
    },
    "/v1/messages": {
        "model": "m",
        "max_tokens": 20,
        "system": [{"type": "text", "text": "x-anthropic-billing-header: 1\nBe brief."}],
        "messages": [
            {"role": "user", "content": "hi"},
            {
                "role": "assistant",
                "content": [
                    {"type": "thinking", "thinking": "t", "signature": "s"},
                    {"type": "text", "text": "a"},
                    {"type": "tool_use", "id": "t1", "name": "f", "input": {"a": "x"}},
                ],
            },
            {
                "role": "user",
                "content": [{"type": "tool_result", "tool_use_id": "t1", "content": "ok"}],
            },
        ],
        "tools": [{"name": "f", "description": "d", "input_schema": SCHEMA, "strict": True}],
        "tool_choice": {"type": "any", "disable_parallel_tool_use": True},
        "thinking": {"type": "enabled", "budget_tokens": 1024},
        "output_config": {"effort": "low", "format": {"type": "json_schema", "schema": SCHEMA}},
        "stop_sequences": ["x"],
        "temperature": 0.5,
        "top_k": 3,
        "metadata": {"user_id": "u"},
        "stream": True,
    },
    "/v1/messages/count_tokens": {"model": "m", "messages": [{"role": "user", "content": "hi"}]},
    "/tokenize": {"prompt": "hi", "add_special_tokens": False},
    "/detokenize": {"tokens": [1, 2, 3]},
}

WORDS = [
    *["", "\0", "\ud800", "\ue000", "｜DSML｜", "</think>", "auto", "none", "required", "tool"],
    *[
        "system",
        "user",
        "assistant",
        "developer",
        "image",
        "image_url",
        "a" * 3000,
        "(",
        "[a-",
        "f",
    ],
]
NUMBERS = [0, -1, 1, 2, 129_280, 2**31, 2**63, 2**64, -(2**64), 10**400, 1e308, -0.0, 0.5]
SCHEMAS = [
    {"$ref": "#"},
    {"$ref": "#/$defs/x", "$defs": {"x": {"$ref": "#/$defs/x"}}},
    {"type": "string", "pattern": "(a*)*b", "maxLength": 10**6},
    {"type": "array", "minItems": 10**6, "items": {"type": "number", "multipleOf": 0.1}},
    {"enum": list(range(20_000))},
    {"anyOf": [{"const": n} for n in range(300)], "not": {}},
    {"type": "object", "patternProperties": {"(": {}}, "properties": {'a"\n': {"type": "string"}}},
    {"type": ["string", "null"], "format": "date-time", "minLength": -1},
    {"type": "object", "properties": {"a": {"type": "string", "enum": ["x</y", "<", "\n"]}}},
]


def _nested(depth: int) -> object:
    value: object = {}
    for _ in range(depth):
        value = {"type": "object", "properties": {"a": value}}
    return value


DEEP = [b'{"a":' * 100_000, b"[" * 5000 + b"]" * 5000, b'{"messages":' + b"[" * 900 + b"]" * 900]

leaf = (
    st.none()
    | st.booleans()
    | st.sampled_from(NUMBERS)
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.sampled_from(WORDS)
    | st.text(max_size=8)
    | st.sampled_from(SCHEMAS)
    | st.sampled_from([10, 100]).map(_nested)
)
anything = st.recursive(
    leaf,
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=6), inner, max_size=4)
    ),
    max_leaves=8,
)


def places(value: object) -> list[tuple[Any, Any]]:
    """(container, key) of everything within a JSON value."""
    found: list[tuple[Any, Any]] = []
    left = [value]
    while left:
        part = left.pop()
        keys = (
            part.keys()
            if isinstance(part, dict)
            else range(len(part))
            if isinstance(part, list)
            else ()
        )
        for key in list(keys):
            found.append((part, key))
            left.append(part[key])
    return found


@st.composite
def bodies(draw: st.DrawFn) -> tuple[str, bytes]:
    """(path, body). Most are a valid body with a few things changed."""
    path = draw(st.sampled_from(list(VALID)))
    body = copy.deepcopy(VALID[path])
    for name in draw(st.lists(st.sampled_from(list(body)), max_size=len(body))):
        if name not in ("model", "messages", "input", "prompt", "max_tokens"):
            body.pop(name, None)
    for _ in range(draw(st.sampled_from([0, 1, 1, 1, 2, 3]))):
        all_places = places(body)
        if not all_places:
            break
        container, key = draw(st.sampled_from(all_places))
        change = draw(st.integers(0, 3))
        if change == 0:
            del container[key]
        elif change == 1 and isinstance(container, list):
            container.append(copy.deepcopy(container[key]))
        else:
            container[key] = copy.deepcopy(draw(anything))  # later changes are to this one
    if draw(st.integers(0, 19)) == 0:
        return path, draw(st.binary(max_size=40) | st.sampled_from(DEEP))
    text = json.dumps(body, ensure_ascii=draw(st.booleans())).encode(errors="surrogatepass")
    if draw(st.integers(0, 19)) == 0:
        at = draw(st.integers(0, len(text)))
        text = text[:at] + draw(st.binary(max_size=3)) + text[at + draw(st.integers(0, 3)) :]
    return path, text
