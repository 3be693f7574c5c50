"""The official Python SDKs drive every endpoint, streaming included."""

import json

import anthropic
import httpx
import openai
import pytest
from pydantic import BaseModel

from tests.serving import MODEL, TOKENIZER, serving

D = "｜DSML｜"
CALL = (
    f'\n\n<{D}tool_calls>\n<{D}invoke name="get_weather">\n'
    f'<{D}parameter name="place" string="true">Aix "en" Provence</{D}parameter>\n'
    f'<{D}parameter name="days" string="false">3</{D}parameter>\n'
    f"</{D}invoke>\n</{D}tool_calls>"
)
ARGUMENTS = {"place": 'Aix "en" Provence', "days": 3}
ANSWER = "Good day, three words."
SCHEMA = {
    "type": "object",
    "properties": {"place": {"type": "string"}, "days": {"type": "integer"}},
    "required": ["place"],
}
TOOLS = [{"type": "function", "function": {"name": "get_weather", "parameters": SCHEMA}}]
USER = [{"role": "user", "content": "hi"}]


def reply(request):
    """Think if asked to; call the tool once; keep to a grammar; else greet."""
    prompt = TOKENIZER.decode(request.prompt)
    thought = "let me see</think>" if prompt.endswith("<think>") else ""
    if "### Available Tool Schemas" in prompt and "<tool_result>" not in prompt:
        return thought + CALL
    return thought + ('{"a": 1}' if request.grammar else ANSWER)


@pytest.fixture(scope="module")
def url():
    with serving(reply=reply) as (url, _):
        yield url


@pytest.fixture(scope="module")
def gpt(url):
    with openai.OpenAI(base_url=url + "/v1", api_key="none", max_retries=0) as client:
        yield client


@pytest.fixture(scope="module")
def claude(url):
    with anthropic.Anthropic(base_url=url, api_key="none", max_retries=0) as client:
        yield client


def test_chat(gpt):
    found = gpt.chat.completions.create(model=MODEL, messages=USER)
    message = found.choices[0].message
    assert (message.content, message.reasoning_content) == (ANSWER, "let me see")
    assert found.choices[0].finish_reason == "stop"
    assert found.usage.prompt_tokens + found.usage.completion_tokens == found.usage.total_tokens
    assert found.timings["predicted_n"] == found.usage.completion_tokens


def test_chat_streams(gpt):
    usage = {"include_usage": True}
    chunks = list(
        gpt.chat.completions.create(model=MODEL, messages=USER, stream=True, stream_options=usage)
    )
    deltas = [chunk.choices[0].delta for chunk in chunks if chunk.choices]
    assert "".join(delta.content or "" for delta in deltas) == ANSWER
    assert "".join(delta.reasoning_content or "" for delta in deltas) == "let me see"
    assert chunks[-1].choices == []
    assert chunks[-1].usage.completion_tokens == len(
        TOKENIZER.encode_with_specials("let me see</think>" + ANSWER)
    )
    assert all(chunk.usage is None for chunk in chunks[:-1])


def test_chat_calls_a_tool_and_reads_its_result(gpt):
    found = gpt.chat.completions.create(model=MODEL, messages=USER, tools=TOOLS)
    message = found.choices[0].message
    assert found.choices[0].finish_reason == "tool_calls"
    assert json.loads(message.tool_calls[0].function.arguments) == ARGUMENTS
    result = {"role": "tool", "tool_call_id": message.tool_calls[0].id, "content": "sunny"}
    found = gpt.chat.completions.create(
        model=MODEL, messages=[*USER, message.to_dict(), result], tools=TOOLS
    )
    assert found.choices[0].message.content == ANSWER


def test_chat_streams_a_call_as_it_is_written(gpt):
    with gpt.chat.completions.stream(model=MODEL, messages=USER, tools=TOOLS) as stream:
        events = [event.type for event in stream]
        call = stream.get_final_completion().choices[0].message.tool_calls[0]
    assert events.count("tool_calls.function.arguments.delta") > 5
    assert json.loads(call.function.arguments) == ARGUMENTS


def test_chat_has_several_choices(gpt):
    chunks = gpt.chat.completions.create(model=MODEL, messages=USER, n=3, stream=True)
    texts = ["", "", ""]
    for chunk in chunks:
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
    assert texts == [ANSWER] * 3
    found = gpt.chat.completions.create(model=MODEL, messages=USER, n=3)
    assert [choice.index for choice in found.choices] == [0, 1, 2]


def test_chat_parses_into_a_model(gpt):
    class Answer(BaseModel):
        a: int

    found = gpt.chat.completions.parse(model=MODEL, messages=USER, response_format=Answer)
    assert found.choices[0].message.parsed == Answer(a=1)


def test_chat_tells_logprobs(gpt):
    off = {"thinking": {"type": "disabled"}}
    found = gpt.chat.completions.create(
        model=MODEL, messages=USER, logprobs=True, top_logprobs=2, extra_body=off
    )
    content = found.choices[0].logprobs.content
    assert "".join(each.token for each in content) == ANSWER
    assert all(len(each.top_logprobs) == 2 for each in content)


def test_chat_stops_at_a_word(gpt):
    found = gpt.chat.completions.create(model=MODEL, messages=USER, stop=["three"])
    assert found.choices[0].message.content == "Good day, "
    assert found.choices[0].finish_reason == "stop"


def test_completions(gpt):
    found = gpt.completions.create(model=MODEL, prompt="hi", max_tokens=50, logprobs=1)
    assert found.choices[0].text == ANSWER
    assert "".join(found.choices[0].logprobs.tokens) == ANSWER
    chunks = gpt.completions.create(model=MODEL, prompt=["a", "b"], stop=",", stream=True)
    texts = ["", ""]
    for chunk in chunks:
        texts[chunk.choices[0].index] += chunk.choices[0].text
    assert texts == ["Good day"] * 2


def test_responses(gpt):
    found = gpt.responses.create(model=MODEL, input="hi")
    assert (found.output_text, found.status) == (ANSWER, "completed")
    with gpt.responses.stream(model=MODEL, input="hi") as stream:
        kinds = {event.type for event in stream}
        assert stream.get_final_response().output_text == ANSWER
    assert {"response.created", "response.reasoning_text.delta", "response.completed"} <= kinds


def test_responses_are_stored_and_continued(gpt):
    first = gpt.responses.create(model=MODEL, input="hi")
    second = gpt.responses.create(model=MODEL, input="more", previous_response_id=first.id)
    assert second.usage.input_tokens > first.usage.input_tokens + first.usage.output_tokens - 10
    assert second.previous_response_id == first.id
    assert gpt.responses.retrieve(first.id).output_text == ANSWER
    gpt.responses.delete(first.id)
    with pytest.raises(openai.NotFoundError):
        gpt.responses.retrieve(first.id)
    with pytest.raises(openai.NotFoundError):
        gpt.responses.create(model=MODEL, input="more", previous_response_id=first.id)


def test_responses_call_a_tool(gpt):
    tools = [{"type": "function", **TOOLS[0]["function"]}]
    found = gpt.responses.create(model=MODEL, input="hi", tools=tools)
    call = next(item for item in found.output if item.type == "function_call")
    assert json.loads(call.arguments) == ARGUMENTS
    result = {"type": "function_call_output", "call_id": call.call_id, "output": "sunny"}
    found = gpt.responses.create(
        model=MODEL, input=[result], tools=tools, previous_response_id=found.id
    )
    assert found.output_text == ANSWER


def test_messages(claude):
    found = claude.messages.create(model=MODEL, max_tokens=100, messages=USER)
    assert [block.text for block in found.content] == [ANSWER]
    assert found.stop_reason == "end_turn"
    thinking = {"type": "enabled", "budget_tokens": 1024}
    found = claude.messages.create(model=MODEL, max_tokens=2000, messages=USER, thinking=thinking)
    assert [block.type for block in found.content] == ["thinking", "text"]


def test_messages_stream_a_call(claude):
    tools = [{"name": "get_weather", "input_schema": SCHEMA}]
    with claude.messages.stream(model=MODEL, max_tokens=1000, messages=USER, tools=tools) as stream:
        kinds = {event.type for event in stream}
        found = stream.get_final_message()
    assert {"message_start", "input_json", "message_stop"} <= kinds
    assert (found.stop_reason, found.content[-1].input) == ("tool_use", ARGUMENTS)
    result = {"type": "tool_result", "tool_use_id": found.content[-1].id, "content": "sunny"}
    messages = [
        *USER,
        {"role": "assistant", "content": found.content},
        {"role": "user", "content": [result]},
    ]
    found = claude.messages.create(model=MODEL, max_tokens=100, messages=messages, tools=tools)
    assert found.content[-1].text == ANSWER


def test_messages_are_counted(claude):
    counted = claude.messages.count_tokens(model=MODEL, messages=USER)
    found = claude.messages.create(model=MODEL, max_tokens=100, messages=USER)
    assert counted.input_tokens == found.usage.input_tokens


def test_models_are_listed(gpt, claude):
    assert [model.id for model in gpt.models.list()] == [MODEL]
    assert [model.id for model in claude.models.list()] == [MODEL]
    assert gpt.models.retrieve(MODEL).id == MODEL
    with pytest.raises(openai.NotFoundError):
        gpt.models.retrieve("other")


def test_errors_have_types(gpt, claude):
    with pytest.raises(openai.BadRequestError):
        gpt.chat.completions.create(model=MODEL, messages=[])
    with pytest.raises(openai.BadRequestError) as error:
        gpt.chat.completions.create(model=MODEL, messages=[{**USER[0], "content": "hi " * 9000}])
    assert error.value.code == "context_length_exceeded"
    with pytest.raises(anthropic.BadRequestError, match="prompt is too long"):
        claude.messages.create(
            model=MODEL, max_tokens=9, messages=[{**USER[0], "content": "hi " * 9000}]
        )


def test_text_and_ids(url):
    ids = httpx.post(url + "/tokenize", json={"prompt": "hi there"}).json()["tokens"]
    assert ids == [TOKENIZER.bos_id, *TOKENIZER.encode("hi there")]
    text = httpx.post(url + "/detokenize", json={"tokens": ids[1:]}).json()["prompt"]
    assert text == "hi there"
    chat = httpx.post(url + "/tokenize", json={"messages": USER}).json()
    assert chat["count"] == len(chat["tokens"]) > 3
