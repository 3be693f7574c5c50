"""Requests as two coding agents send them: valid answers, and prompts that repeat to the byte.

The bodies in tests/agents have the shape of Claude Code's and Codex's requests (fields, kinds of
tools, order of items); their texts are made up. Those in recorded_*.json were sent by Claude Code
2.1.197, Codex 0.169.0 and opencode 1.18.33 (bench/agent_clis.py); longer texts are left out.
"""

import json
from pathlib import Path

import anthropic
import httpx
import openai
import pytest

from tests.serving import TOKENIZER, serving

FOLDER = Path(__file__).parent / "agents"
D = "｜DSML｜"


def parameter(name, value):
    string = "true" if isinstance(value, str) else "false"
    text = value if isinstance(value, str) else json.dumps(value, separators=(",", ": "))
    return f'<{D}parameter name="{name}" string="{string}">{text}</{D}parameter>\n'


def block(*calls):
    """DSML as a model writes it: compact JSON, a parameter order of its own."""
    invokes = "".join(
        f'<{D}invoke name="{name}">\n'
        + "".join(parameter(*item) for item in arguments.items())
        + f"</{D}invoke>\n"
        for name, arguments in calls
    )
    return f"\n\n<{D}tool_calls>\n{invokes}</{D}tool_calls>"


class Script:
    """An engine's answers, one after the other; the requests' prompts are kept."""

    def __init__(self, *answers):
        self.answers, self.prompts, self.given = list(answers), [], []

    def __call__(self, request):
        self.prompts.append(list(request.prompt))
        self.given.append(TOKENIZER.encode_with_specials(self.answers[len(self.given)]))
        return self.given[-1]

    def assert_prefixes(self):
        """Each prompt begins with the one before and exactly what was sampled after it."""
        for n in range(1, len(self.prompts)):
            known = self.prompts[n - 1] + self.given[n - 1]
            begins = self.prompts[n][: len(known)]
            assert TOKENIZER.decode(begins) == TOKENIZER.decode(known), f"turn {n} differs"
            assert begins == known


TODOS = [{"content": "Fix area", "status": "in_progress", "activeForm": "Fixing area"}]
EDIT = {
    "new_string": "    return w * h\n",
    "old_string": "    return w + h\n",
    "file_path": "/home/user/project/area.py",
}


@pytest.mark.parametrize("thinking", [True, False])
def test_claude_code(thinking):
    thought = "The test expects a product.</think>" if thinking else ""
    script = Script(
        f"{thought}I will look."
        + block(("Read", {"limit": 20, "file_path": "area.py"}), ("TodoWrite", {"todos": TODOS})),
        thought + block(("Edit", EDIT)),
        f"{thought}Done: area() multiplies now.",
    )
    body = json.loads((FOLDER / "claude_code.json").read_text())
    if not thinking:
        del body["thinking"], body["output_config"]
    with (
        serving(reply=script) as (url, _),
        anthropic.Anthropic(base_url=url, api_key="x") as client,
    ):
        for turn in range(3):
            # What changes in every request of this client
            header = f"x-anthropic-billing-header: cc_version=2.1.42.a{turn}f; cch=0fe3{turn};"
            body["system"][0]["text"] = header
            events = client.post(
                "/v1/messages?beta=true",
                body=body,
                cast_to=object,
                stream=True,
                stream_cls=anthropic.Stream[anthropic.types.RawMessageStreamEvent],
            )
            message = collect(events)
            body["messages"].append({"role": "assistant", "content": message["content"]})
            results = [
                {"type": "tool_result", "tool_use_id": part["id"], "content": f"done {turn}"}
                for part in message["content"]
                if part["type"] == "tool_use"
            ]
            body["messages"].append({"role": "user", "content": results})
            if turn == 1:
                assert message["content"][-1]["input"] == EDIT
    assert message["stop_reason"] == "end_turn"
    assert message["content"][-1]["text"] == "Done: area() multiplies now."
    script.assert_prefixes()


def collect(events):
    """The message that a stream of Anthropic's events describes."""
    message, texts = {}, {}
    for event in events:
        event = event if isinstance(event, dict) else event.to_dict()
        if event["type"] == "message_start":
            message = event["message"]
        elif event["type"] == "content_block_start":
            message["content"].append(event["content_block"])
            texts[event["index"]] = ""
        elif event["type"] == "content_block_delta":
            part, delta = message["content"][event["index"]], event["delta"]
            if delta["type"] == "input_json_delta":
                texts[event["index"]] += delta["partial_json"]
            else:
                field = delta["type"].removesuffix("_delta")
                part[field] = (part.get(field) or "") + delta[field]
        elif event["type"] == "content_block_stop" and texts[event["index"]]:
            message["content"][event["index"]]["input"] = json.loads(texts[event["index"]])
        elif event["type"] == "message_delta":
            message.update(event["delta"])
    return message


PATCH = "*** Begin Patch\n*** Update File: area.py\n-    return 1\n+    return 1.0\n*** End Patch\n"


def test_codex():
    plan = {"plan": [{"step": "Look", "status": "in_progress"}]}
    script = Script(
        "First a plan.</think>" + block(("update_plan", plan)),
        "Now look.</think>I look." + block(("exec_command", {"yield_time_ms": 1000, "cmd": "ls"})),
        "Patch it.</think>" + block(("apply_patch", {"input": PATCH})),
        "All done.</think>area() returns a float.",
    )
    body = json.loads((FOLDER / "codex.json").read_text())
    with (
        serving(reply=script) as (url, _),
        openai.OpenAI(base_url=url + "/v1", api_key="x") as client,
    ):
        for _turn in range(4):
            stream = client.responses.create(**body)
            *_, last = stream
            assert last.type == "response.completed"
            for item in last.response.output:
                item = item.to_dict()
                if item["type"] == "reasoning":
                    item.pop("content")  # Codex keeps the encrypted form only
                body["input"].append(item)
                if item["type"] in ("function_call", "custom_tool_call"):
                    result = {"type": item["type"] + "_output", "call_id": item["call_id"]}
                    body["input"].append({**result, "output": "ok"})
    assert last.response.output_text == "area() returns a float."
    kinds = [item["type"] for item in body["input"][3:]]
    assert kinds.count("function_call") == 2
    patch = next(item for item in body["input"] if item["type"] == "custom_tool_call")
    assert (patch["name"], patch["input"]) == ("apply_patch", PATCH)
    script.assert_prefixes()


def test_a_changed_history_is_not_replayed():
    script = Script("</think>" + block(("Read", {"file_path": "a.py"})), "</think>1.", "</think>2.")
    body = {**json.loads((FOLDER / "claude_code.json").read_text()), "stream": False}
    with serving(reply=script) as (url, _), httpx.Client(base_url=url, timeout=60) as client:
        call = client.post("/v1/messages", json=body).json()["content"][-1]
        result = {"type": "tool_result", "tool_use_id": call["id"], "content": "x"}
        for path in ("a.py", "b.py"):
            call["input"] = {"file_path": path}
            turn = [
                {"role": "assistant", "content": [call]},
                {"role": "user", "content": [result]},
            ]
            later = {**body, "messages": body["messages"] + turn}
            assert client.post("/v1/messages", json=later).status_code == 200
    assert "b.py" in TOKENIZER.decode(script.prompts[2])
    assert "b.py" not in TOKENIZER.decode(script.prompts[1])


RECORDED = {
    "claude_code": ("/v1/messages?beta=true", "message_stop"),
    "codex": ("/v1/responses", "response.completed"),
    "opencode": ("/v1/chat/completions", "[DONE]"),
}


@pytest.mark.parametrize("agent", RECORDED)
def test_recorded_requests_are_answered(agent):
    path, end = RECORDED[agent]
    bodies = json.loads((FOLDER / f"recorded_{agent}.json").read_text())
    answers = [block(("Read", {"limit": 20, "file_path": "area.py"})), "Fixed."] * 2
    script = Script(*(f"A thought.</think>{answer}" for answer in answers))
    with (
        serving(reply=script, context=100_000) as (url, _),
        httpx.Client(base_url=url, timeout=60) as client,
    ):
        for body in bodies:
            answer = client.post(path, json=body)
            assert answer.status_code == 200, answer.text
            lines = answer.text.splitlines()
            events = [line[6:] for line in lines if line.startswith("data: ")]
            kinds = [json.loads(e).get("type") if e.startswith("{") else e for e in events]
            assert kinds[-1] == end
            assert "error" not in kinds
    assert len(bodies) >= 2
