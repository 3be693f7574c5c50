"""Tools of a request: which must or may be called, and which strictly."""

from collections.abc import Sequence
from typing import Any

from . import bodies
from .errors import ApiError
from .grammar import Tool, resolved


def take_strict(functions: Sequence[Any]) -> frozenset[str]:
    """The names of strict functions, whose mark is taken off.

    deepseek-recipe would refuse some schemas of strict tools that a grammar can keep.
    """
    names = []
    for function in functions:
        if isinstance(function, dict) and function.pop("strict", None) is True:
            names.append(function.get("name"))
    return frozenset(name for name in names if isinstance(name, str))


def chosen(choice: Any) -> tuple[bool, tuple[str, ...] | None]:
    """OpenAI's tool_choice: whether a call must come, and the only names it may have."""
    if choice in (None, "auto", "none"):
        return False, None
    if choice == "required":
        return True, None
    if isinstance(choice, dict):
        if choice.get("type") == "allowed_tools":
            return _allowed(choice)
        if choice.get("type") in ("function", "custom"):
            return True, (_name(choice),)
    raise ApiError(
        400, "tool_choice must be auto, none, required, or name a function", param="tool_choice"
    )


def _allowed(choice: dict[str, Any]) -> tuple[bool, tuple[str, ...]]:
    inner = choice.get("allowed_tools", choice)  # nested in chat completions, flat in responses
    tools = inner.get("tools") if isinstance(inner, dict) else None
    names = tuple(_name(tool) for tool in bodies.objects(tools))
    if not names:
        raise ApiError(400, "allowed_tools needs a list of tools", param="tool_choice")
    return inner.get("mode") == "required", names


def _name(tool: dict[str, Any]) -> str:
    inner = tool.get("function") or tool.get("custom") or tool
    name = inner.get("name") if isinstance(inner, dict) else None
    if not isinstance(name, str):
        raise ApiError(400, "tool_choice names no function", param="tool_choice")
    return name


def for_grammar(
    tools: Sequence[Any], strict: frozenset[str], allowed: tuple[str, ...] | None
) -> list[Tool]:
    """deepseek-recipe's tool definitions as a grammar takes them. Raises ApiError."""
    names = None if allowed is None else frozenset(allowed)
    found = [tool for tool in tools if names is None or tool.name in names]
    if not found:
        what = "there are no tools" if allowed is None else f"no tool is called {allowed[0]!r}"
        raise ApiError(400, f"tool_choice asks for a call, but {what}", param="tool_choice")
    return [
        Tool(
            tool.name,
            tool.parameters if isinstance(tool.parameters, dict) else {},
            tool.name in strict,
        )
        for tool in found
    ]


class Parameters:
    """What the schemas of deepseek-recipe's tool definitions say of their parameters."""

    def __init__(self, tools: Sequence[Any]) -> None:
        self._tools = tools

    def __call__(self, tool: str, name: str) -> tuple[bool, bool]:
        """Whether the parameter takes strings, and whether other values; unknown ones do both."""
        schema = next((each.parameters for each in self._tools if each.name == tool), None)
        if not isinstance(schema, dict):
            return True, True
        properties = schema.get("properties")
        if not isinstance(properties, dict) or name not in properties:
            return True, True
        shared = {key: schema[key] for key in ("$defs", "definitions") if key in schema}
        return _takes(properties[name], shared)


def _takes(schema: Any, shared: dict[str, Any], depth: int = 0) -> tuple[bool, bool]:
    if not isinstance(schema, dict) or depth > 8:
        return True, True
    schema = resolved(schema, shared)
    listed = [schema["const"]] if "const" in schema else schema.get("enum")
    if isinstance(listed, list) and listed:
        texts = [isinstance(value, str) for value in listed]
        return any(texts), not all(texts)
    for word in ("anyOf", "oneOf"):
        parts = schema.get(word)
        if isinstance(parts, list) and parts:
            found = [_takes(part, shared, depth + 1) for part in parts]
            return any(text for text, _ in found), any(other for _, other in found)
    kinds = schema.get("type")
    kinds = kinds if isinstance(kinds, list) else [kinds]
    if kinds == [None]:
        return True, True
    return "string" in kinds, any(kind != "string" for kind in kinds)
