"""POST /v1/responses, in OpenAI's words."""

import json
from typing import Any

import deepseek_recipe as recipe

from . import bodies
from .bodies import Wishes
from .dialect import OPTIONS, Dialect, Run, sse
from .errors import ApiError
from .tools import chosen, take_strict

# What the answer repeats of the request, where deepseek-recipe does not.
ECHOED = (
    "tools",
    "tool_choice",
    "parallel_tool_calls",
    "previous_response_id",
    "metadata",
    "presence_penalty",
    "frequency_penalty",
    "prompt_cache_key",
    "safety_identifier",
    "max_tool_calls",
    "truncation",
)


class Responses(Dialect):
    request = recipe.ResponsesRequest
    response = recipe.ResponsesResponse
    prefix = "resp_"

    def adapt(self, body: dict[str, Any], vocab_size: int) -> Wishes:
        for name in ("background", "conversation", "prompt"):
            if body.get(name):
                raise ApiError(400, f"{name} is not supported", param=name)
        for item in bodies.objects(body.get("input")):
            _adapt_item(item)
        if isinstance(body.get("instructions"), str):
            body["instructions"] = bodies.without_billing(body["instructions"])
        echo = {name: body[name] for name in ECHOED if body.get(name) is not None}
        echo["store"] = bodies.flag(body, "store", True)
        tools = bodies.objects(body.get("tools"))
        echo["tools"] = [_echo_tool(tool) for tool in tools]
        wishes = Wishes(
            strict=take_strict(tools),
            parallel=bodies.flag(body, "parallel_tool_calls", True),
            sampling=bodies.sampling(body, vocab_size),
            ignore_eos=bodies.flag(body, "ignore_eos"),
            echo=echo,
            store=echo["store"],
        )
        wishes.sampling["seed"] = bodies.seed(body)
        wishes.required, wishes.allowed = chosen(body.get("tool_choice"))
        if body.get("tool_choice") != "none":
            body.pop("tool_choice", None)
        reasoning = body.get("reasoning")
        effort = reasoning.get("effort") if isinstance(reasoning, dict) else None
        wishes.effort = effort if isinstance(effort, str) else None
        text = body.get("text")
        if isinstance(text, dict):
            wishes.echo["verbosity"] = text.get("verbosity")
            if isinstance(text.get("format"), dict):
                wishes.echo["format"] = dict(text["format"])
                text["format"].pop("strict", None)  # the grammar sees to it
        return wishes

    def generator(self, request: Any, converted: Any, run: Run) -> Any:
        namespaces = self.request(request).namespace_tool_map(OPTIONS)
        echo = self.request(request).echo()
        generator = self.request.chunk_generator(converted, run.id, run.model)
        return generator.with_namespace_tool_map(namespaces).with_echo(echo)

    def event(self, event: dict[str, Any], index: int, run: Run) -> dict[str, Any]:
        if "response" in event:
            event["response"] = run.last = self._complete(event["response"], run)
            if event["type"] in ("response.completed", "response.incomplete"):
                run.last["timings"] = run.timings
        return event

    def whole(self, answers: list[dict[str, Any]], run: Run) -> dict[str, Any]:
        return {**self._complete(answers[0], run), "timings": run.timings}

    def said(self, whole: dict[str, Any]) -> dict[str, Any]:
        reasoning = [item for item in whole["output"] if item["type"] == "reasoning"]
        messages = [item for item in whole["output"] if item["type"] == "message"]
        calls = []
        for item in whole["output"]:
            if item["type"] == "function_call":
                calls.append((item["call_id"], item["name"], item["arguments"]))
            elif item["type"] == "custom_tool_call":
                arguments = json.dumps({"input": item["input"]})
                calls.append((item["call_id"], item["name"], arguments))
        return {
            "reasoning_text": "".join(p["text"] for item in reasoning for p in item["content"]),
            "content": "".join(part["text"] for item in messages for part in item["content"]),
            "calls": tuple(calls),
        }

    def failure(self, error: ApiError, run: Run) -> bytes:
        """response.failed, with the response as far as it is known."""
        problem: dict[str, Any] = {"code": "server_error", "message": error.message}
        failed = {**run.last, "status": "failed", "error": problem}
        if not run.last:
            event = {"type": "error", "param": None, **problem}
        else:
            event = {"type": "response.failed", "response": failed}
        return sse(event["type"], {**event, "sequence_number": run.events})

    def _complete(self, response: dict[str, Any], run: Run) -> dict[str, Any]:
        echo = dict(run.wishes.echo)
        verbosity, form = echo.pop("verbosity", None), echo.pop("format", None)
        response.update(echo)
        response["created_at"] = run.created
        text = response["text"]
        if not text.get("verbosity"):
            text["verbosity"] = verbosity or "medium"
        if form is not None:
            text["format"] = form
        return response


def _adapt_item(item: dict[str, Any]) -> None:
    if item.get("type") == "item_reference":
        raise ApiError(400, "item_reference is not supported: send the item", param="input")
    if item.get("role") in (None, "assistant"):
        return  # a picture that a tool returned is told to the model as one it cannot see
    for part in bodies.objects(item.get("content")):
        if part.get("type") in ("input_image", "input_file", "input_audio"):
            raise ApiError(400, f"{part['type']}: the model reads only text", param="input")


def _echo_tool(tool: dict[str, Any]) -> dict[str, Any]:
    if tool.get("type") != "function":
        return dict(tool)
    return {"description": None, "parameters": None, "strict": False, **tool}
