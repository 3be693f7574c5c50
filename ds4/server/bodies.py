"""Request bodies: decoded, bounded, and the fields that all dialects read the same way."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import msgspec

from .errors import ApiError
from .grammar import Format

BILLING = "x-anthropic-billing-header:"  # one client's first line, different in every request


@dataclass
class Wishes:
    """What a request asks for beyond what deepseek-recipe takes or tells.

    effort     as asked for, not deepseek-recipe's default
    allowed    names of the only tools that may be called; None: all
    strict     names of the tools whose arguments must fit their schema
    sampling   fields of SamplingParams that all dialects call by the same name
    continues  the last message begins the answer
    """

    effort: str | None = None
    n: int = 1
    required: bool = False
    allowed: tuple[str, ...] | None = None
    strict: frozenset[str] = frozenset()
    parallel: bool = True
    format: Format | None = None
    schema: Any = None
    sampling: dict[str, Any] = field(default_factory=dict)
    ignore_eos: bool = False
    continues: bool = False
    include_usage: bool = False
    echo: dict[str, Any] = field(default_factory=dict)  # fields that the answer repeats
    items: list[Any] | None = None  # the input items of a response, to be stored with it
    store: bool = False


def decode(body: bytes) -> dict[str, Any]:
    """A JSON object. Raises ApiError."""
    try:
        value = msgspec.json.decode(body)
    except (ValueError, RecursionError) as error:  # msgspec's errors are ValueErrors
        raise ApiError(400, f"the body is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise ApiError(400, "the body must be a JSON object")
    if b"\\u0000" in body and any("\0" in text for text in texts(value)):
        raise ApiError(400, "the body holds the character NUL, which no text needs")
    return value


def encode(value: Any) -> bytes:
    """Raises ApiError for numbers that JSON cannot carry on."""
    try:
        return msgspec.json.encode(value)
    except (ValueError, TypeError, OverflowError, RecursionError) as error:
        raise ApiError(400, f"the body cannot be read: {error}") from error


def texts(value: Any) -> Iterator[str]:
    """Every string within a JSON value, keys too."""
    left = [value]
    while left:
        part = left.pop()
        if isinstance(part, str):
            yield part
        elif isinstance(part, dict):
            left += [*part.keys(), *part.values()]
        elif isinstance(part, list):
            left += part


def objects(value: Any) -> list[dict[str, Any]]:
    """The objects of a list; nothing if it is none: deepseek-recipe says then what is wrong."""
    return [each for each in value if isinstance(each, dict)] if isinstance(value, list) else []


def number(body: Mapping[str, Any], name: str, low: float, high: float, whole: bool = False) -> Any:
    """A number of the body, None if it is not there or null. Raises ApiError."""
    value = body.get(name)
    if value is None:
        return None
    kinds = int if whole else (int, float)
    fits = isinstance(value, kinds) and not isinstance(value, bool)
    if not fits or not low <= value <= high:  # no comparison holds for NaN
        kind = "a whole number" if whole else "a number"
        raise ApiError(400, f"{name} must be {kind} from {low} to {high}", param=name)
    return value


def flag(body: Mapping[str, Any], name: str, default: bool = False) -> bool:
    """A boolean of the body. Raises ApiError."""
    value = body.get(name)
    if value is not None and not isinstance(value, bool):
        raise ApiError(400, f"{name} must be true or false", param=name)
    return default if value is None else value


def sampling(body: Mapping[str, Any], vocab_size: int) -> dict[str, Any]:
    """Fields of SamplingParams beside temperature, top_p and the limits of length."""
    found = {
        "presence_penalty": number(body, "presence_penalty", -2, 2),
        "frequency_penalty": number(body, "frequency_penalty", -2, 2),
        "repetition_penalty": number(body, "repetition_penalty", 0.01, 100),
        "top_k": number(body, "top_k", -1, 1 << 30, whole=True),
        "min_p": number(body, "min_p", 0, 1),
        "logit_bias": _logit_bias(body.get("logit_bias"), vocab_size),
    }
    if found["top_k"] == -1:  # others' word for all
        found["top_k"] = 0
    return {name: value for name, value in found.items() if value is not None}


def seed(body: Mapping[str, Any]) -> int | None:
    value = number(body, "seed", -(1 << 63), (1 << 64) - 1, whole=True)
    return None if value is None else int(value) % (1 << 63)


def _logit_bias(value: Any, vocab_size: int) -> dict[int, float] | None:
    if value is None:
        return None
    if not isinstance(value, dict):
        raise ApiError(400, "logit_bias must be an object of token ids", param="logit_bias")
    if len(value) > 1024:
        raise ApiError(400, "logit_bias may name up to 1024 tokens", param="logit_bias")
    found = {}
    for name, asked in value.items():
        whole = name.isascii() and name.isdigit() and len(name) <= 12
        if not whole or not int(name) < vocab_size:
            raise ApiError(400, f"logit_bias: {name[:40]!r} is no token", param="logit_bias")
        bias = number({"logit_bias": asked}, "logit_bias", -100, 100)
        if bias is not None:
            found[int(name)] = float(bias)
    return found


def without_billing(text: str) -> str:
    """A system prompt without the line that changes with every request, which no cache survives."""
    while text.startswith(BILLING):
        text = text.partition("\n")[2].lstrip("\n")
    return text
