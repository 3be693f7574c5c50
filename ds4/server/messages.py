"""POST /v1/messages, in Anthropic's words."""

import json
from typing import Any

import deepseek_recipe as recipe

from . import bodies
from .bodies import Wishes
from .dialect import Dialect, Run, sse
from .errors import ApiError
from .grammar import Format, json_schema
from .tools import take_strict

KINDS = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
}


class Messages(Dialect):
    request = recipe.MessagesRequest
    response = recipe.MessagesResponse
    prefix = "msg_"

    def adapt(self, body: dict[str, Any], vocab_size: int) -> Wishes:
        if body.get("max_tokens") is None:
            raise ApiError(400, "max_tokens: Field required")
        for message in bodies.objects(body.get("messages")):
            _adapt_message(message)
        _adapt_system(body)
        tools = bodies.objects(body.get("tools"))
        for tool in tools:
            if tool.get("type") == "custom":
                del tool["type"]
        wishes = Wishes(strict=take_strict(tools), ignore_eos=bodies.flag(body, "ignore_eos"))
        wishes.sampling = bodies.sampling(body, vocab_size)
        wishes.sampling["seed"] = bodies.seed(body)
        _adapt_choice(body, wishes)
        _adapt_format(body, wishes)
        if body.get("thinking") is None:
            body["thinking"] = {"type": "disabled"}  # here one thinks when asked to
        output = body.get("output_config")
        effort = output.get("effort") if isinstance(output, dict) else None
        wishes.effort = effort if isinstance(effort, str) else None
        messages = bodies.objects(body.get("messages"))
        wishes.continues = bool(messages) and messages[-1].get("role") == "assistant"
        return wishes

    def event(self, event: dict[str, Any], index: int, run: Run) -> dict[str, Any]:
        if event["type"] == "message_start":
            _complete(event["message"])
        elif event["type"] == "content_block_start":
            _complete_block(event["content_block"])
        elif event["type"] == "message_delta":
            event["delta"].setdefault("container", None)
            event["timings"] = run.timings
        return event

    def whole(self, answers: list[dict[str, Any]], run: Run) -> dict[str, Any]:
        return {**_complete(answers[0]), "timings": run.timings}

    def said(self, whole: dict[str, Any]) -> dict[str, Any]:
        blocks = whole["content"]
        return {
            "reasoning_text": "".join(b["thinking"] for b in blocks if b["type"] == "thinking"),
            "content": "".join(b["text"] for b in blocks if b["type"] == "text"),
            "calls": tuple(
                (block["id"], block["name"], json.dumps(block["input"]))
                for block in blocks
                if block["type"] == "tool_use"
            ),
        }

    def error(self, error: ApiError) -> dict[str, Any]:
        kind = KINDS.get(error.status, "api_error")
        if error.code == "queue_full":
            kind = "overloaded_error"
        message = error.message
        return {"type": "error", "error": {"type": kind, "message": message}, "request_id": None}

    def failure(self, error: ApiError, run: Run) -> bytes:
        return sse("error", self.error(error))

    def alive(self) -> bytes:
        return b'event: ping\ndata: {"type":"ping"}\n\n'


def _adapt_message(message: dict[str, Any]) -> None:
    parts = message.get("content")
    if isinstance(parts, list):  # a thought that another model hid says nothing to this one
        message["content"] = [part for part in parts if not _is_hidden(part)]
    for at, part in enumerate(bodies.objects(message.get("content"))):
        kind = part.get("type")
        if kind == "image" and message.get("role") == "user":
            raise ApiError(400, f"content {at} is an image: the model reads only text")
        if kind == "document":
            source = part.get("source")
            if not isinstance(source, dict) or source.get("type") != "text":
                raise ApiError(400, f"content {at} is a document that is not plain text")
            part.clear()
            part.update(type="text", text=source.get("data"))


def _is_hidden(part: Any) -> bool:
    return isinstance(part, dict) and part.get("type") == "redacted_thinking"


def _adapt_system(body: dict[str, Any]) -> None:
    system = body.get("system")
    if isinstance(system, str):
        body["system"] = bodies.without_billing(system)
    for part in bodies.objects(system)[:1]:
        if isinstance(part.get("text"), str):
            part["text"] = bodies.without_billing(part["text"])
            if not part["text"]:
                body["system"] = system[1:] if isinstance(system, list) else system


def _adapt_choice(body: dict[str, Any], wishes: Wishes) -> None:
    choice = body.pop("tool_choice", None)
    if choice is None:
        return
    if not isinstance(choice, dict) or choice.get("type") not in ("auto", "any", "tool", "none"):
        raise ApiError(400, "tool_choice.type must be auto, any, tool or none")
    wishes.parallel = not bodies.flag(choice, "disable_parallel_tool_use")
    wishes.required = choice["type"] in ("any", "tool")
    if choice["type"] == "tool":
        if not isinstance(choice.get("name"), str):
            raise ApiError(400, "tool_choice.name: a tool's name is required")
        wishes.allowed = (choice["name"],)
    if choice["type"] == "none":
        body["tool_choice"] = {"type": "none"}


def _adapt_format(body: dict[str, Any], wishes: Wishes) -> None:
    """Structured outputs, which deepseek-recipe does not know in this dialect."""
    output = body.get("output_config")
    form = output.get("format") if isinstance(output, dict) else None
    form = form or body.get("output_format")
    if form is None:
        return
    schema = form.get("schema") if isinstance(form, dict) else None
    if not isinstance(schema, dict) or form.get("type") != "json_schema":
        raise ApiError(400, "output_config.format must have type json_schema and a schema")
    wishes.schema = schema
    wishes.format = Format("json_schema", json_schema(schema))


def _complete(message: dict[str, Any]) -> dict[str, Any]:
    """The fields that Anthropic's schema requires beyond deepseek-recipe's."""
    usage = message["usage"]
    usage.setdefault("cache_creation", None)
    usage.setdefault("inference_geo", None)
    usage.setdefault("server_tool_use", None)
    usage.setdefault("output_tokens_details", None)
    message.setdefault("container", None)
    message.setdefault("stop_details", None)
    for block in message["content"]:
        _complete_block(block)
    return message


def _complete_block(block: dict[str, Any]) -> None:
    if block["type"] == "text":
        block.setdefault("citations", None)
    if block["type"] == "tool_use":
        block.setdefault("caller", {"type": "direct"})
