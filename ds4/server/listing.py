"""Endpoints that answer without an engine: models, token counts, ids and text."""

from datetime import UTC, datetime
from typing import Any

from ..errors import PromptError
from . import bodies
from .bodies import Wishes
from .chat import Chat
from .errors import ApiError
from .messages import Messages
from .prepare import convert, encode
from .served import Served, ServedModel


def models(served: Served) -> dict[str, Any]:
    """OpenAI's list and Anthropic's in one."""
    found = [card(model) for model in served.models.values()]
    ends = {"first_id": found[0]["id"], "last_id": found[-1]["id"]}
    return {"object": "list", "data": found, "has_more": False, **ends}


def card(model: ServedModel) -> dict[str, Any]:
    created = model.client.model.created
    return {
        "id": model.name,
        "object": "model",
        "created": created,
        "owned_by": "ds4",
        "type": "model",
        "display_name": model.name,
        "created_at": datetime.fromtimestamp(created, UTC).isoformat().replace("+00:00", "Z"),
        "max_model_len": model.client.context,
    }


def count_tokens(raw: bytes, served: Served) -> dict[str, Any]:
    """Anthropic's: the tokens of a Messages request. Raises ApiError."""
    body = bodies.decode(raw)
    model = served.pick(body.get("model"))
    body.setdefault("max_tokens", 1)
    return {"input_tokens": len(_encoded(Messages(), body, model))}


def tokenize(raw: bytes, served: Served) -> dict[str, Any]:
    """The ids of `prompt` or `content`, or of chat `messages`. Raises ApiError."""
    body = bodies.decode(raw)
    model = served.pick(body.get("model", next(iter(served.models))))
    ids = _encoded(Chat(), body, model) if "messages" in body else _text_ids(body, model)
    return {"tokens": ids, "count": len(ids), "max_model_len": model.client.context}


def _text_ids(body: dict[str, Any], model: ServedModel) -> list[int]:
    text = body.get("prompt", body.get("content"))
    if not isinstance(text, str):
        raise ApiError(400, "prompt must be text", param="prompt")
    # vLLM adds the begin token unless told not to; llama-server, with `content`, if told to
    begins = bodies.flag(body, "add_special_tokens", "prompt" in body)
    if bodies.flag(body, "add_special"):
        begins = True
    try:
        ids = model.tokenizer.encode(text)
    except PromptError as error:
        raise ApiError(400, str(error), param="prompt") from error
    return [model.tokenizer.bos_id, *ids] if begins else ids


def detokenize(raw: bytes, served: Served) -> dict[str, Any]:
    """The text of `tokens`. Raises ApiError."""
    body = bodies.decode(raw)
    model = served.pick(body.get("model", next(iter(served.models))))
    ids = body.get("tokens")
    size = model.tokenizer.size
    if not isinstance(ids, list) or not all(
        isinstance(token, int) and not isinstance(token, bool) and 0 <= token < size
        for token in ids
    ):
        raise ApiError(400, f"tokens must be ids below {size}", param="tokens")
    text = model.tokenizer.decode(ids)
    return {"prompt": text, "content": text}


def _encoded(dialect: Any, body: dict[str, Any], model: ServedModel) -> list[int]:
    wishes: Wishes = dialect.adapt(body, model.tokenizer.size)
    _, converted = convert(dialect, body)
    return encode(model, converted.conversation, wishes)
