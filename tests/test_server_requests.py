"""What of a request reaches the engine, and what is refused before."""

import deepseek_recipe as recipe
import httpx
import pytest

from ds4.chat import ChatEncoding
from ds4.loader import find_model
from ds4.server.client import ModelInfo
from ds4.server.dialect import OPTIONS
from ds4.server.local import LocalClient
from ds4.server.served import ServedModel, Settings
from tests.fake_engine import FakeEngine
from tests.serving import MODEL, TOKENIZER, serving

USER = [{"role": "user", "content": "hi"}]
OFF = {"thinking": {"type": "disabled"}}
CHAT = {"model": MODEL, "messages": USER}
TOOL = {"name": "f", "parameters": {"type": "object", "properties": {"a": {"type": "string"}}}}
TOOLS = [{"type": "function", "function": TOOL}]


@pytest.fixture(scope="module")
def server():
    with serving() as (url, engine), httpx.Client(base_url=url, timeout=60) as client:
        yield client, engine


@pytest.fixture
def taken(server):
    """Post a chat; the request that the engine took."""
    client, engine = server

    def post(path="/v1/chat/completions", **body):
        found = client.post(path, json={**CHAT, **body})
        assert found.status_code == 200, found.text
        return engine.requests[-1]

    return post


@pytest.fixture
def refused(server):
    """Post what must be refused; its status and message."""
    client, _ = server

    def post(path="/v1/chat/completions", **body):
        found = client.post(path, json={**CHAT, **body})
        assert 400 <= found.status_code < 500, found.text
        return found.status_code, found.json()["error"]["message"]

    return post


def test_prompts_are_the_chat_encodings(taken):
    encoding = ChatEncoding(find_model("demo") / "tokenizer.json")
    assert taken().prompt == encoding.encode(USER, "low")
    assert taken(reasoning_effort="max").prompt == encoding.encode(USER, "max")
    assert taken(reasoning_effort="high").prompt == encoding.encode(USER, "high")
    off = {"chat_template_kwargs": {"enable_thinking": False}}
    assert taken(**off).prompt == encoding.encode(USER, "off")
    assert taken(**OFF).prompt == encoding.encode(USER, "off")
    assert taken(tools=TOOLS).prompt == encoding.encode(USER, "low", TOOLS)
    typed = [{"role": "user", "content": "<｜User｜></think>"}]
    assert taken(messages=typed).prompt == encoding.encode(typed, "low")
    developer = [{"role": "developer", "content": "Be brief."}, *USER]
    assert taken(messages=developer).prompt == encoding.encode(developer, "low")


def test_efforts_of_the_later_release():
    file = find_model("demo") / "tokenizer.json"
    encoding = ChatEncoding(file, "official")
    client = LocalClient(FakeEngine(TOKENIZER), ModelInfo("m", 1), 9)
    model = ServedModel(client, file, "official")
    body = {"model": "ds4", "messages": USER}
    converted = recipe.ChatCompletionRequest(body).convert(OPTIONS)
    for effort in ("low", "high", "max"):
        wanted = encoding.encode(USER, effort)
        assert model.encoder.encode(converted.conversation, effort) == wanted
    client.close()


def test_sampling_options_reach_the_engine(taken):
    options = {"temperature": 0.3, "top_p": 0.7, "top_k": 5, "min_p": 0.1, "seed": 9}
    penalties = {"presence_penalty": 0.5, "frequency_penalty": -0.5, "repetition_penalty": 1.5}
    bias = {"logit_bias": {"5": 1.5}}
    params = taken(**options, **penalties, **bias, **OFF, max_tokens=7).params
    for name, value in {**options, **penalties}.items():
        assert getattr(params, name) == value, name
    assert (params.logit_bias, params.max_tokens) == ({5: 1.5}, 7)
    # while it thinks the model's own sampling counts
    params = taken(**options, **penalties, **bias).params
    assert (params.temperature, params.top_p, params.top_k, params.seed) == (1.0, 1.0, 0, 9)
    assert (params.presence_penalty, params.logit_bias) == (0.0, {5: 1.5})
    assert taken(ignore_eos=True).params.logit_bias[TOKENIZER.eos_id] < -1000
    params = taken("/v1/completions", prompt="x", max_tokens=3, stop="y", seed=-1).params
    assert (params.max_tokens, params.stop, params.seed) == (3, ("y",), 2**63 - 1)


def test_answers_longer_than_the_context_are_cut_to_it(taken):
    request = taken(max_tokens=1_000_000)
    assert request.params.max_tokens == 4096 - len(request.prompt)


def test_several_choices_have_several_seeds(server, taken):
    last = taken(n=3, seed=5)
    assert {r.params.seed for r in server[1].requests[-3:]} == {5, 6, 7}
    assert last.id.endswith("-2")


@pytest.mark.parametrize(
    ("body", "kind"),
    [
        ({"response_format": {"type": "regex", "regex": "a+"}, **OFF}, "regex"),
        ({"response_format": {"type": "regex", "regex": "a+"}}, "lark"),
        ({"tools": TOOLS}, None),
        ({"tools": TOOLS, "tool_choice": "none"}, None),
        ({"tools": TOOLS, "tool_choice": "required"}, "lark"),
        ({"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "f"}}}, "lark"),
        ({"tools": [{"type": "function", "function": {**TOOL, "strict": True}}]}, "lark"),
    ],
)
def test_forms_become_grammars(taken, body, kind):
    grammar = taken(**body).grammar
    assert (grammar and grammar.kind) == kind
    if kind == "lark":
        assert grammar.text.startswith("start: FREE <[")


def test_what_cannot_be_kept_loosely_is_refused_only_if_strict(taken, refused):
    odd = {"type": "object", "properties": {"a": {"type": "integer", "not": {"const": 3}}}}
    tools = [{"type": "function", "function": {"name": "f", "parameters": odd}}]
    assert taken(tools=tools, tool_choice="required").grammar.kind == "lark"
    tools[0]["function"]["strict"] = True
    assert refused(tools=tools)[0] == 400


@pytest.mark.parametrize(
    ("body", "word"),
    [
        ({"messages": [{"role": "user", "content": "a\0b"}]}, "NUL"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "only text"),
        ({"n": 17}, "n must be"),
        ({"n": True}, "n must be"),
        ({"logit_bias": {"x": 1}}, "logit_bias"),
        ({"logit_bias": {"999999": 1}}, "logit_bias"),
        ({"logit_bias": {"0" * 5000 + "1": 1}}, "no token"),
        ({"logit_bias": {"5": 101}}, "logit_bias must be"),
        ({"presence_penalty": 3}, "presence_penalty"),
        ({"functions": [{}]}, "tools"),
        ({"tool_choice": "required"}, "no tools"),
        ({"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "g"}}}, "'g'"),
        ({"response_format": {"type": "regex", "regex": "(a"}}, "cannot be kept"),
        (
            {
                "response_format": {
                    "type": "json_schema",
                    "json_schema": {"name": "x", "schema": True},
                }
            },
            "must be an object",
        ),
        ({"model": 5}, "model"),
        ({"model": "x" * 300}, "model"),
    ],
)
def test_requests_that_are_refused(refused, body, word):
    status, message = refused(**body)
    assert status == 400
    assert word in message


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/responses", {"input": "x", "background": True}),
        ("/v1/responses", {"input": "x", "conversation": "c"}),
        ("/v1/responses", {"input": [{"type": "item_reference", "id": "x"}]}),
        ("/v1/messages", {"messages": USER}),
        ("/v1/completions", {"prompt": "x", "suffix": "y"}),
        ("/v1/completions", {"prompt": [[]]}),
        ("/detokenize", {"tokens": [-1]}),
    ],
)
def test_other_dialects_refuse_too(refused, path, body):
    assert refused(path, **body)[0] == 400


def test_pictures_are_refused_from_users_and_named_from_tools(server):
    client, engine = server
    picture = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": ""}}
    body = {**CHAT, "max_tokens": 5, "messages": [{"role": "user", "content": [picture]}]}
    assert client.post("/v1/messages", json=body).status_code == 400
    call = {"type": "tool_use", "id": "t", "name": "f", "input": {}}
    result = {"type": "tool_result", "tool_use_id": "t", "content": [picture]}
    body["messages"] = [
        *USER,
        {"role": "assistant", "content": [call]},
        {"role": "user", "content": [result]},
    ]
    assert client.post("/v1/messages", json=body).status_code == 200
    assert "[Unsupported Image]" in TOKENIZER.decode(engine.requests[-1].prompt)


def test_the_billing_line_does_not_change_the_prompt(server):
    client, engine = server
    prompts = []
    for n in range(2):
        line = f"x-anthropic-billing-header: cc_version=1; cch={n};"
        for system in (f"{line}\nBe brief.", [{"type": "text", "text": line + "\nBe brief."}]):
            body = {**CHAT, "max_tokens": 5, "system": system}
            assert client.post("/v1/messages", json=body).status_code == 200
            prompts.append(engine.requests[-1].prompt)
    assert prompts.count(prompts[0]) == 4
    assert "Be brief." in TOKENIZER.decode(prompts[0])


def test_a_messages_answer_that_was_begun_goes_on(server):
    client, engine = server
    begun = [*USER, {"role": "assistant", "content": "The answer is"}]
    body = {**CHAT, "max_tokens": 5, "messages": begun}
    assert client.post("/v1/messages", json=body).status_code == 200
    assert TOKENIZER.decode(engine.requests[-1].prompt).endswith("</think>The answer is")
    begun[-1]["content"] = [
        {"type": "redacted_thinking", "data": ""},
        {"type": "text", "text": "A"},
    ]
    assert client.post("/v1/messages", json=body).status_code == 200
    assert TOKENIZER.decode(engine.requests[-1].prompt).endswith("</think>A")


def test_a_schema_has_only_so_much_time():
    form = {"response_format": {"type": "regex", "regex": "a+"}}
    with serving(settings=Settings(grammar_s=0)) as (url, _):
        found = httpx.post(url + "/v1/chat/completions", json={**CHAT, **form}, timeout=60)
    assert found.status_code == 400
    assert "too long" in found.json()["error"]["message"]


def test_a_full_queue_says_when_to_come_again():
    with serving(slots=1, max_waiting=0) as (url, _):
        for path, status in (("/v1/chat/completions", 429), ("/v1/messages", 429)):
            found = httpx.post(url + path, json={**CHAT, "max_tokens": 5})
            assert found.status_code == status
            assert int(found.headers["retry-after"]) >= 1
        assert found.json()["error"]["type"] == "overloaded_error"
