"""Conversations to token ids: DeepSeek's wording, turns replayed token by token.

deepseek-recipe renders the text and says where it put control tokens; everything between is plain
text, encoded so that nothing a user typed becomes a control token. Pieces of text are remembered,
for the next turn of an agent repeats all of them.
"""

import secrets
import threading
from array import array
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import deepseek_recipe as recipe

from ..chat import EFFORTS, Profile
from ..errors import CheckpointError
from ..tokenizer import Tokenizer
from .grammar import THINK_END
from .replay import Replays, Turn

MAX_CACHED = 16 << 20  # characters of text whose ids are remembered
WORTH_CACHING = 64  # characters


class PromptEncoder:
    """For one tokenizer and one release of the model. Safe to call from several threads."""

    def __init__(self, tokenizer: Tokenizer, profile: Profile, replays: Replays) -> None:
        self._tokenizer, self._profile, self._replays = tokenizer, profile, replays
        self._encoding = recipe.DeepseekV4Encoding()
        self._pieces = _Pieces(tokenizer)

    def encode(
        self,
        conversation: Any,
        effort: str | None = None,
        schema: Any = None,
        continues: bool = False,
    ) -> list[int]:
        """The ids of a prompt that ends where the model begins, BOS included.

        effort     low, high, xhigh or max, in the words of the server's API
        schema     the answer's, where deepseek-recipe did not find one in the request
        continues  the last message is the beginning of the answer
        """
        inserts: dict[str, Sequence[int]] = {}
        messages = [self._message(message, inserts) for message in conversation.messages]
        if continues:
            messages[-1] = recipe.AssistantMessage(messages[-1].content, prefix=True)
        if schema is None:
            schema = conversation.response_schema
        rendered = self._encoding.render_conversation(
            _with(conversation, messages, self._effort(effort), schema)
        )
        ids: list[int] = []
        at, text = 0, rendered.prompt
        for start, end in rendered.special_ranges:
            ids += self._plain(text[at:start], inserts)
            ids.append(self._special(text[start:end]))
            at = end
        return ids + self._plain(text[at:], inserts)

    def turn(self, ids: list[int], thinks: bool, **texts: Any) -> Turn | None:
        """A turn to be replayed, from what was sampled; None if its thought has no end."""
        cut = -1
        if thinks:
            end = self._special(THINK_END)
            if end not in ids:
                return None
            cut = ids.index(end)
        return Turn(array("i", ids[: max(cut, 0)]), array("i", ids[cut + 1 :]), **texts)

    def _effort(self, effort: str | None) -> str | None:
        if effort is None:
            return None
        return EFFORTS[self._profile]["max" if effort == "xhigh" else effort]

    def _message(self, message: Any, inserts: dict[str, Sequence[int]]) -> Any:
        """A message, or marks in place of its texts where its very tokens are known."""
        turn = self._replays.find(message) if message.role == "assistant" else None
        if turn is None:
            return message
        marks = [f"\ue000{secrets.token_hex(16)}\ue001" for _ in range(2)]
        inserts.update(zip(marks, (turn.reasoning, turn.rest), strict=True))
        thought = marks[0] if turn.reasoning else message.reasoning_content
        return recipe.AssistantMessage(marks[1], thought, None)

    def _plain(self, text: str, inserts: dict[str, Sequence[int]]) -> list[int]:
        if "\ue000" in text:
            for mark, ids in inserts.items():
                before, found, after = text.partition(mark)
                if found:
                    return [*self._plain(before, inserts), *ids, *self._plain(after, inserts)]
        return self._pieces.encode(text)

    def _special(self, text: str) -> int:
        token = self._tokenizer.token_id(text)
        if token is None:
            raise CheckpointError(f"tokenizer.json has no token {text}")
        return token


class _Pieces:
    """Texts with their ids, the longest unused forgotten first."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._known: OrderedDict[str, Sequence[int]] = OrderedDict()
        self._size = 0
        self._lock = threading.Lock()

    def encode(self, text: str) -> list[int]:
        if len(text) < WORTH_CACHING:
            return self._tokenizer.encode(text) if text else []
        with self._lock:
            known = self._known.get(text)
            if known is not None:
                self._known.move_to_end(text)
                return list(known)
        ids = self._tokenizer.encode(text)
        with self._lock:
            if text not in self._known:
                self._known[text] = array("i", ids)
                self._size += len(text)
            while self._size > MAX_CACHED:
                self._size -= len(self._known.popitem(last=False)[0])
        return ids


def _with(conversation: Any, messages: list[Any], effort: Any, schema: Any) -> Any:
    """A conversation with other messages, another effort and another schema."""
    form = conversation.response_format
    return recipe.Conversation(
        messages,
        thinking_mode=conversation.thinking_mode,
        tools=conversation.tools,
        tool_choice=conversation.tool_choice,
        reasoning_effort=effort if conversation.thinking_mode else None,
        response_format=form if form == "json_object" else "text",
        response_schema=schema,
        response_regex=conversation.response_regex,
    )
