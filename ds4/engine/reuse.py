"""Where the beginning of a new prompt is known already: in a slot, or in a snapshot.

A slot keeps its rows when its request is over, so an idle slot may hold a prefix; so may one whose
request still runs; and one whose request is still absorbing the same prompt soon will. Snapshots
are the prefix cache's.
"""

from array import array
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from ..runner import Runner

LEAST = 16  # tokens worth reusing


class Prefixes(Protocol):
    """Snapshots of prefixes, in memory or on disk."""

    @property
    def bytes(self) -> int: ...

    @property
    def disk_bytes(self) -> int: ...

    def find(self, tokens: Any) -> Any | None:
        """The longest known proper prefix, which has a `length`, or None."""

    def restore(self, hit: Any, runner: Runner, slot: int) -> None:
        """Make a slot hold that prefix; afterwards runner.lengths tells how long it is."""

    def keep(self, runner: Runner, slot: int, tokens: Any) -> None:
        """Remember what a slot holds, which is `tokens`."""

    def close(self) -> None: ...


@dataclass(frozen=True)
class Source:
    """What is known of a prompt: `length` tokens, to be had in `slot` by doing `fetch`."""

    length: int
    slot: int
    fetch: Callable[[], None]


class Slots:
    """The tokens that each slot holds; of them runner.lengths[slot] have rows."""

    def __init__(self, runner: Runner, prefixes: Prefixes | None) -> None:
        self.runner, self.prefixes = runner, prefixes
        self.held = [array("i") for _ in range(runner.slots)]

    def length(self, slot: int) -> int:
        """How many tokens of a slot are known and have rows."""
        return min(len(self.held[slot]), self.runner.lengths[slot])

    def clear(self, slot: int) -> None:
        self.runner.rewind(slot, 0)
        self.held[slot] = array("i")

    def settle(self, slot: int) -> None:
        """Its request is over: what remains is what is known."""
        self.runner.rewind(slot, self.length(slot))

    def common(self, slot: int, prompt: "array[int]") -> int:
        """The longest prefix of a prompt, one token left to be run, that a slot can be cut to."""
        length = common(self.held[slot], prompt, min(self.length(slot), len(prompt) - 1))
        return length if length >= LEAST and self.runner.can_rewind(slot, length) else 0

    def keep(self, slot: int) -> None:
        """Let the prefix cache remember what a slot holds."""
        length = self.length(slot)
        if self.prefixes is not None and length >= LEAST:
            self.prefixes.keep(self.runner, slot, self.held[slot][:length])

    def source(self, prompt: "array[int]", idle: Iterable[int]) -> Source:
        """The best way to begin a prompt; `idle` slots come the longest idle first."""
        idle = list(idle)
        best = self._fresh(idle[0])
        for slot in idle:
            if (length := self.common(slot, prompt)) > best.length:
                best = self._cut(slot, length)
        hit = None if self.prefixes is None else self.prefixes.find(prompt)
        if hit is not None and hit.length > best.length:
            best = self._snapshot(hit, idle[0])
        return best

    def _fresh(self, slot: int) -> Source:
        return Source(0, slot, lambda: self.clear(slot))

    def _cut(self, slot: int, length: int) -> Source:
        return Source(length, slot, lambda: self.runner.rewind(slot, length))

    def _snapshot(self, hit: Any, slot: int) -> Source:
        def fetch() -> None:
            assert self.prefixes is not None
            self.clear(slot)
            self.prefixes.restore(hit, self.runner, slot)

        return Source(hit.length, slot, fetch)


def common(a: "array[int]", b: "array[int]", most: int) -> int:
    """How many of the first `most` tokens are the same."""
    if most <= 0 or a[0] != b[0]:
        return 0
    differ = np.frombuffer(a, np.int32, most) != np.frombuffer(b, np.int32, most)
    first = int(differ.argmax())
    return first if differ[first] else most
