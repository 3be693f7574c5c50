"""Responses that a later request may continue, or that a client may fetch again."""

import threading
from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

import msgspec

MAX_BYTES = 64 << 20


@dataclass(frozen=True)
class Stored:
    """A response as it was sent, and the items that led to it, as JSON."""

    response: bytes
    items: bytes

    def conversation(self) -> list[Any]:
        """The input items of a request that goes on from here."""
        output: list[Any] = msgspec.json.decode(self.response)["output"]
        items: list[Any] = msgspec.json.decode(self.items)
        return items + output


class ResponseStore:
    """In memory; the longest unused go first. Safe to call from several threads."""

    def __init__(self, max_bytes: int = MAX_BYTES) -> None:
        self._max, self._size = max_bytes, 0
        self._stored: OrderedDict[str, Stored] = OrderedDict()
        self._lock = threading.Lock()

    def put(self, response: dict[str, Any], items: list[Any]) -> None:
        stored = Stored(msgspec.json.encode(response), msgspec.json.encode(items))
        with self._lock:
            self._stored[response["id"]] = stored
            self._size += _size(stored)
            while self._size > self._max:
                self._size -= _size(self._stored.popitem(last=False)[1])

    def get(self, response_id: str) -> Stored | None:
        with self._lock:
            if response_id in self._stored:
                self._stored.move_to_end(response_id)
            return self._stored.get(response_id)

    def delete(self, response_id: str) -> bool:
        with self._lock:
            stored = self._stored.pop(response_id, None)
            if stored is not None:
                self._size -= _size(stored)
            return stored is not None


def _size(stored: Stored) -> int:
    return len(stored.response) + len(stored.items)
