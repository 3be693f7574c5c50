"""The exact tokens of turns that called tools, so that the next prompt repeats them.

A client sends a call back as JSON. Written as DSML again that may differ from what was sampled (in
spaces, in the order or kind of parameters, in how text was cut into tokens), and a cache of the
prompt's prefix would end there. Most clients do not send the thought back at all. So a turn is
kept under the ids of its calls and stands in for the client's version where both say the same.
"""

import json
import threading
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

MAX_TOKENS = 4_000_000  # of all turns kept, at 4 bytes each


@dataclass(frozen=True)
class Turn:
    """What the model answered once.

    reasoning, rest  its token ids before and after </think>; the end token is in neither
    calls            (id, name, arguments) as they were sent to the client
    """

    reasoning: Sequence[int]
    rest: Sequence[int]
    reasoning_text: str
    content: str
    calls: tuple[tuple[str, str, str], ...]

    def says(self, content: str, reasoning: str, calls: Sequence[tuple[str, str, str]]) -> bool:
        """Whether a client's version of the turn means the same; a thought may be missing."""
        return (
            content.strip() == self.content.strip()
            and reasoning.strip() in ("", self.reasoning_text.strip())
            and len(calls) == len(self.calls)
            and all(map(_same_call, calls, self.calls))
        )


class Replays:
    """Turns by the ids of their calls; the longest unused go first. Safe to call from threads."""

    def __init__(self, max_tokens: int = MAX_TOKENS) -> None:
        self._max = max_tokens
        self._tokens = 0
        self._turns: OrderedDict[str, Turn] = OrderedDict()  # under the id of the first call
        self._lock = threading.Lock()

    def remember(self, turn: Turn) -> None:
        key = turn.calls[0][0]
        with self._lock:
            self._tokens += _size(turn) - _size(self._turns.pop(key, None))
            self._turns[key] = turn
            while self._tokens > self._max:
                self._tokens -= _size(self._turns.popitem(last=False)[1])

    def find(self, message: Any) -> Turn | None:
        """The turn that an assistant's message of deepseek-recipe repeats."""
        calls = [(call.id, call.name, call.arguments) for call in message.tool_calls or ()]
        if not calls:
            return None
        with self._lock:
            turn = self._turns.get(calls[0][0])
            if turn is not None:
                self._turns.move_to_end(calls[0][0])
        says = turn and turn.says(message.content, message.reasoning_content or "", calls)
        return turn if says else None

    def __len__(self) -> int:
        return len(self._turns)


def _size(turn: Turn | None) -> int:
    return len(turn.reasoning) + len(turn.rest) if turn else 0


def _same_call(one: tuple[str, str, str], other: tuple[str, str, str]) -> bool:
    if one[:2] != other[:2]:
        return False
    try:
        return bool(json.loads(one[2] or "{}") == json.loads(other[2] or "{}"))
    except (ValueError, RecursionError):
        return one[2] == other[2]
