"""POST /v1/chat/completions, in OpenAI's words with DeepSeek's reasoning_content."""

from typing import Any

import deepseek_recipe as recipe

from . import bodies
from .bodies import Wishes
from .dialect import Dialect, Run
from .errors import ApiError
from .tools import chosen, take_strict

MAX_N = 16


class Chat(Dialect):
    request = recipe.ChatCompletionRequest
    response = recipe.ChatCompletionResponse
    prefix = "chatcmpl-"

    def adapt(self, body: dict[str, Any], vocab_size: int) -> Wishes:
        refuse_unknown_ways(body)
        for message in bodies.objects(body.get("messages")):
            _adapt_message(message)
        functions = [tool.get("function") for tool in bodies.objects(body.get("tools"))]
        options = body.get("stream_options")
        wishes = Wishes(
            n=bodies.number(body, "n", 1, MAX_N, whole=True) or 1,
            strict=take_strict(functions),
            parallel=bodies.flag(body, "parallel_tool_calls", True),
            sampling=bodies.sampling(body, vocab_size),
            ignore_eos=bodies.flag(body, "ignore_eos"),
            include_usage=bodies.flag(options, "include_usage")
            if isinstance(options, dict)
            else False,
        )
        wishes.required, wishes.allowed = chosen(body.get("tool_choice"))
        if body.get("tool_choice") != "none":
            body.pop("tool_choice", None)
        _adapt_thinking(body)
        effort = body.get("reasoning_effort")
        wishes.effort = effort if isinstance(effort, str) else None
        longest = bodies.number(body, "max_completion_tokens", 1, 1 << 31, whole=True)
        if longest is not None:
            body["max_tokens"] = longest
        form = body.get("response_format")
        if isinstance(form, dict) and isinstance(form.get("json_schema"), dict):
            form["json_schema"].pop("strict", None)  # the grammar sees to it
        wishes.sampling["seed"] = bodies.seed(body)
        for name in ("n", "seed", "logit_bias", "stream_options"):
            body.pop(name, None)
        return wishes

    def event(self, event: dict[str, Any], index: int, run: Run) -> dict[str, Any]:
        event.pop("usage", None)
        event["created"] = run.created
        if run.wishes.include_usage:
            event["usage"] = None
        for choice in event["choices"]:
            choice["index"] = index
            if choice["finish_reason"] and not run.wishes.include_usage:
                event["timings"] = run.timings
        return event

    def last_events(self, run: Run, usages: list[Any]) -> list[dict[str, Any]]:
        if not run.wishes.include_usage:
            return []
        usage = _sum(usages)
        head = {"id": run.id, "object": "chat.completion.chunk", "created": run.created}
        more = {"model": run.model, "choices": [], "usage": usage, "timings": run.timings}
        return [{**head, **more}]

    def whole(self, answers: list[dict[str, Any]], run: Run) -> dict[str, Any]:
        first = answers[0]
        first["choices"] = [answer["choices"][0] for answer in answers]
        for index, choice in enumerate(first["choices"]):
            choice["index"] = index
            choice["message"].setdefault("refusal", None)
            choice["message"].setdefault("annotations", [])
            for call in choice["message"].get("tool_calls") or ():
                call.pop("index", None)
        first["usage"] = _sum([answer["usage"] for answer in answers])
        return {**first, "timings": run.timings}

    def said(self, whole: dict[str, Any]) -> dict[str, Any]:
        message = whole["choices"][0]["message"]
        calls = message.get("tool_calls") or ()
        return {
            "reasoning_text": message.get("reasoning_content") or "",
            "content": message.get("content") or "",
            "calls": tuple(
                (call["id"], call["function"]["name"], call["function"]["arguments"])
                for call in calls
            ),
        }

    def event_name(self, event: dict[str, Any]) -> str | None:
        return None


def refuse_unknown_ways(body: dict[str, Any]) -> None:
    """Raises ApiError for what would change the answer and cannot be done."""
    for name in ("functions", "function_call"):
        if body.get(name):
            raise ApiError(400, f"{name} is not supported: use tools", param=name)
    modalities = body.get("modalities")
    if body.get("audio") or (isinstance(modalities, list) and modalities != ["text"]):
        raise ApiError(400, "only text can be written", param="modalities")


def _adapt_thinking(body: dict[str, Any]) -> None:
    """vLLM's and SGLang's clients ask for thoughts through the chat template, which is not here."""
    template = body.pop("chat_template_kwargs", None)
    if isinstance(template, dict) and body.get("thinking") is None:
        asked = template.get("thinking", template.get("enable_thinking"))
        if isinstance(asked, bool):
            body["thinking"] = {"type": "enabled" if asked else "disabled"}


def _adapt_message(message: dict[str, Any]) -> None:
    for part in bodies.objects(message.get("content")):
        # A picture that a tool returned is told to the model as one it cannot see.
        if part.get("type") not in ("text", "refusal") and message.get("role") != "tool":
            raise ApiError(400, f"{part.get('type')}: the model reads only text", param="messages")
    if message.get("role") == "developer":
        message["role"] = "system"
    if message.get("role") == "assistant":
        if message.get("reasoning_content") is None and isinstance(message.get("reasoning"), str):
            message["reasoning_content"] = message["reasoning"]
        if not message.get("tool_calls"):
            message.pop("tool_calls", None)
            if message.get("content") is None:
                message["content"] = ""
        if isinstance(message.get("refusal"), str) and not message.get("content"):
            message["content"] = message["refusal"]
    if message.get("role") == "system":
        _strip_billing(message)


def _strip_billing(message: dict[str, Any]) -> None:
    if isinstance(message.get("content"), str):
        message["content"] = bodies.without_billing(message["content"])
    for part in bodies.objects(message.get("content"))[:1]:
        if isinstance(part.get("text"), str):
            part["text"] = bodies.without_billing(part["text"])


def _sum(usages: list[dict[str, Any]]) -> dict[str, Any]:
    """One prompt, several answers."""
    total = dict(usages[0])
    total["completion_tokens"] = sum(usage["completion_tokens"] for usage in usages)
    total["total_tokens"] = total["prompt_tokens"] + total["completion_tokens"]
    details = [usage.get("completion_tokens_details") or {} for usage in usages]
    if any(details):
        thought = sum(detail.get("reasoning_tokens") or 0 for detail in details)
        total["completion_tokens_details"] = {"reasoning_tokens": thought}
    return total
