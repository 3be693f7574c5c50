"""Chat messages to token ids, in the words DeepSeek-V4 was trained on.

The wording is deepseek-recipe's, the official package; here is what it leaves to us. Text that a
user typed never becomes a control token. Two releases of the model differ only in their effort
prefixes, and the package renders the later one: `EFFORTS` says which of its efforts to ask for.
"""

import ast
import json
import os
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import deepseek_recipe as recipe

from .errors import CheckpointError, PromptError
from .tokenizer import StopStrings

Message = Mapping[str, Any]
Profile = Literal["preview", "official"]
THINKING = ("off", "low", "high", "max")

THINK_END = "</think>"

# preview: V4-Flash of April 2026, where low and high are the same and max has one prefix.
# official: V4-Flash-0731, where high has that prefix and max a stronger one.
EFFORTS: dict[Profile, dict[str, str]] = {
    "preview": {"low": "low", "high": "low", "max": "high"},
    "official": {"low": "low", "high": "high", "max": "max"},
}


class ChatEncoding:
    """Renders conversations for one tokenizer and one release of the model."""

    def __init__(
        self, tokenizer_file: str | os.PathLike[str], profile: Profile = "preview"
    ) -> None:
        """Raises CheckpointError, which names the file, at the first `encode`."""
        self.profile = profile
        self._file = Path(tokenizer_file)
        self._encoding: recipe.DeepseekV4Encoding | None = None  # 0.3 s to read: only when used

    def encode(
        self,
        messages: Sequence[Message],
        thinking: str = "off",
        tools: Sequence[Mapping[str, Any]] | None = None,
        **options: Any,
    ) -> list[int]:
        """The ids of a prompt that the model is to answer, BOS included.

        `messages` and `tools` have the shape of OpenAI's chat completions, with DeepSeek's
        reasoning_content; `options` are more fields of that request, such as response_format.
        Raises PromptError.
        """
        conversation = _conversation(messages, thinking, self.profile, tools, options)
        try:
            ids: list[int] = self._with_tokenizer().encode(conversation)
        except RuntimeError as error:
            raise CheckpointError(f"{self._file}: cannot encode a chat: {error}") from error
        return ids

    def render(
        self,
        messages: Sequence[Message],
        thinking: str = "off",
        tools: Sequence[Mapping[str, Any]] | None = None,
        **options: Any,
    ) -> str:
        """The same prompt as text, to be looked at. To encode it again would not be safe."""
        conversation = _conversation(messages, thinking, self.profile, tools, options)
        text: str = recipe.DeepseekV4Encoding().render_conversation(conversation).prompt
        return text

    def _with_tokenizer(self) -> recipe.DeepseekV4Encoding:
        if self._encoding is None:
            try:
                tokenizer = recipe.Tokenizer.from_file(str(self._file))
            except Exception as error:  # the library names no type
                message = f"{self._file}: not a usable tokenizer.json: {error}"
                raise CheckpointError(message) from error
            self._encoding = recipe.DeepseekV4Encoding().with_tokenizer(tokenizer)
        return self._encoding


class ReasoningSplitter:
    """Divides a stream of text, as it comes, into reasoning and content."""

    def __init__(self, thinking: str = "off") -> None:
        self._end = None if thinking == "off" else StopStrings((THINK_END,))

    def push(self, text: str) -> tuple[str, str]:
        """What `text` adds to the reasoning and to the content."""
        if self._end is None:
            return "", text
        reasoning = self._end.push(text)
        content, self._end.rest = self._end.rest, ""
        return reasoning, content

    def flush(self) -> str:
        """The end of a reasoning that was cut off."""
        return self._end.flush() if self._end else ""


def split_reasoning(text: str, thinking: str = "off") -> tuple[str, str]:
    """(reasoning, content) of a completion; all of it is reasoning if that never ended."""
    if thinking == "off":
        return "", text
    reasoning, _, content = text.partition(THINK_END)
    return reasoning, content


def detect_profile(folder: str | os.PathLike[str]) -> Profile:
    """Which release a checkpoint is, from its encoding/encoding_dsv4.py; that code is never run.

    Without a usable file it is taken for the preview, whose "high" adds no prefix.
    """
    names = _assigned(Path(folder) / "encoding" / "encoding_dsv4.py")
    official = names.get("DEFAULT_REASONING_EFFORT") == "low"
    return "official" if official and "REASONING_EFFORT_PROMPTS" in names else "preview"


def _assigned(file: Path) -> dict[str, Any]:
    """Names that a Python file assigns at its top level, with the value if that is a constant."""
    try:
        with warnings.catch_warnings(action="ignore"):
            body = ast.parse(file.read_bytes() if file.is_file() else b"").body
    except (OSError, SyntaxError, ValueError, RecursionError, MemoryError):
        return {}
    found: dict[str, Any] = {}
    for node in body:
        if isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            value = node.value.value if isinstance(node.value, ast.Constant) else None
            found |= {target.id: value for target in targets if isinstance(target, ast.Name)}
    return found


def _conversation(
    messages: Sequence[Message],
    thinking: str,
    profile: Profile,
    tools: Sequence[Mapping[str, Any]] | None,
    options: Mapping[str, Any],
) -> recipe.Conversation:
    """deepseek-recipe's view of a request. Raises PromptError."""
    body = {
        **options,
        "model": "DeepSeek-V4-Pro",  # the name it has for the V4 encoding; Flash's is the same
        "messages": [_accepted(message, at) for at, message in enumerate(messages)],
        **_thinking_fields(thinking, profile),
    }
    if tools:
        body["tools"] = tools
    if thinking != "off" and body.get("tool_choice") not in (None, "auto", "none"):
        body["tool_choice"] = "auto"  # the prompt can't force a call that comes after a thought
    try:
        text = json.dumps(body, ensure_ascii=False, allow_nan=False)
        request = recipe.ChatCompletionRequest(text.encode())
        return request.convert(recipe.ConversionOptions()).conversation
    except recipe.ConversionError as error:
        raise PromptError(json.loads(error.body)["error"]["message"]) from error
    except (ValueError, TypeError, RecursionError) as error:
        raise PromptError(f"not a chat: {error}") from error


def _thinking_fields(thinking: str, profile: Profile) -> dict[str, Any]:
    if thinking not in THINKING:
        raise PromptError(f"thinking must be off, low, high or max, not {thinking!r}")
    if thinking == "off":
        return {"thinking": {"type": "disabled"}}
    return {"thinking": {"type": "enabled"}, "reasoning_effort": EFFORTS[profile][thinking]}


def _accepted(message: Message, at: int) -> Message:
    """A message as deepseek-recipe takes it. Raises PromptError for a picture."""
    if not isinstance(message, Mapping):
        raise PromptError(f"message {at} is not an object with role and content: {message!r}")
    content = message.get("content")
    for part in content if isinstance(content, list) else []:
        if isinstance(part, Mapping) and part.get("type") != "text":
            kind = part.get("type")
            raise PromptError(
                f"message {at} has a part of type {kind!r}: the model reads only text"
            )
    return {**message, "role": "system"} if message.get("role") == "developer" else message
