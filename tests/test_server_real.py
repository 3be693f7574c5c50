"""The demo model through the engine and the API: grammars hold, prefixes are found again."""

import json

import anthropic
import openai
import pytest

import ds4
from ds4.engine.engine import Engine
from tests.serving import MODEL, serving

USER = [{"role": "user", "content": "Tell me of the sea."}]
SCHEMA = {
    "type": "object",
    "properties": {
        "unit": {"type": "string", "enum": ["celsius", "kelvin"]},
        "days": {"type": "integer", "minimum": 1, "maximum": 99},
    },
    "required": ["unit", "days"],
    "additionalProperties": False,
}
OFF = {"thinking": {"type": "disabled"}}


@pytest.fixture(scope="module")
def url():
    engine = Engine(ds4.load("demo", backend="torch", context=1024, slots=3))
    engine.context = 1024
    with serving(engine) as (url, _):
        yield url


@pytest.fixture(scope="module")
def gpt(url):
    with openai.OpenAI(base_url=url + "/v1", api_key="none", max_retries=0) as client:
        yield client


def test_chat_streams_what_it_says_at_once(gpt):
    options = {"model": MODEL, "messages": USER, "temperature": 0, "max_tokens": 12}
    whole = gpt.chat.completions.create(**options, extra_body=OFF).choices[0].message.content
    chunks = gpt.chat.completions.create(**options, extra_body=OFF, stream=True)
    assert "".join(c.choices[0].delta.content or "" for c in chunks) == whole != ""


def test_a_call_that_must_come_comes_with_valid_arguments(gpt):
    tools = [{"type": "function", "function": {"name": "weather", "parameters": SCHEMA}}]
    found = gpt.chat.completions.create(
        model=MODEL,
        messages=USER,
        tools=tools,
        tool_choice="required",
        parallel_tool_calls=False,
        extra_body=OFF,
        seed=1,
    )
    assert found.choices[0].finish_reason == "tool_calls"
    (call,) = found.choices[0].message.tool_calls
    arguments = json.loads(call.function.arguments)
    assert arguments["unit"] in ("celsius", "kelvin")
    assert 1 <= arguments["days"] <= 99
    turn = [
        found.choices[0].message.to_dict(),
        {"role": "tool", "tool_call_id": call.id, "content": "ok"},
    ]
    more = gpt.chat.completions.create(
        model=MODEL, messages=[*USER, *turn], tools=tools, extra_body=OFF, max_tokens=3
    )
    known = found.usage.prompt_tokens + found.usage.completion_tokens
    assert more.usage.prompt_tokens_details.cached_tokens >= known - 1


def test_json_keeps_to_its_schema(gpt):
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA}}
    found = gpt.chat.completions.create(
        model=MODEL, messages=USER, response_format=form, extra_body=OFF, seed=2, max_tokens=200
    )
    assert set(json.loads(found.choices[0].message.content)) == set(SCHEMA["properties"])


def test_messages_call_a_named_tool(url):
    tools = [{"name": name, "input_schema": SCHEMA} for name in ("weather", "tides")]
    choice = {"type": "tool", "name": "tides", "disable_parallel_tool_use": True}
    with (
        anthropic.Anthropic(base_url=url, api_key="none", max_retries=0) as client,
        client.messages.stream(
            model=MODEL, max_tokens=300, messages=USER, tools=tools, tool_choice=choice
        ) as stream,
    ):
        found = stream.get_final_message()
    assert [(block.type, block.name) for block in found.content] == [("tool_use", "tides")]
    assert set(found.content[0].input) == set(SCHEMA["properties"])
