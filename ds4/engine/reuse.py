"""Where the beginning of a new prompt is known already: in a slot, or in a snapshot.

A slot keeps its rows when its request is over: an idle slot may hold a prefix, and is cut to it, or
copied if it holds much more. So may a slot whose request still runs, and one whose request is still
absorbing the same beginning soon will: such a job is waited for. Snapshots are the prefix cache's.
"""

import logging
from array import array
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from ..runner import Runner
from .scheduler import Job
from .snapshot import fork

log = logging.getLogger(__name__)

LEAST = 16  # tokens worth reusing
MUCH = 128  # tokens worth a copy of a slot, a snapshot, or waiting for another request


class Prefixes(Protocol):
    """Snapshots of prefixes, in memory or on disk: what prefix.PrefixCache does."""

    @property
    def bytes(self) -> int: ...

    @property
    def disk_bytes(self) -> int: ...

    def find(self, tokens: Any) -> Any | None:
        """The longest known proper prefix, which has a `length`, or None."""

    def restore(self, hit: Any, runner: Runner, slot: int) -> bool:
        """Make a slot hold that prefix, or if that fails nothing."""

    def stops(self, tokens: Any, start: int) -> list[int]:
        """Lengths beyond `start` at which a prompt is worth keeping."""

    def keep(self, runner: Runner, slot: int, tokens: Any) -> None:
        """Remember what a slot holds, which is `tokens`."""

    def close(self) -> None: ...


@dataclass(frozen=True)
class Source:
    """What is known of a prompt: `length` tokens, to be had in `slot` by doing `fetch`."""

    length: int
    slot: int
    fetch: Callable[[], object]


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

    def keep(self, slot: int, length: int) -> None:
        """Let the prefix cache remember the first tokens of a slot, if it still can."""
        at = self.runner.lengths[slot]
        if self.prefixes is None or length < MUCH or not self.runner.can_rewind(slot, length):
            return
        self.runner.rewind(slot, length)
        try:
            self.prefixes.keep(self.runner, slot, self.held[slot][:length])
        except Exception:  # no memory, no disk: what is not kept is computed again
            log.exception("a prefix could not be kept")
        self.runner.lengths[slot] = at

    def begin(self, source: Source, prompt: "array[int]") -> int:
        """Let a slot hold what is known of a prompt; how many tokens that are."""
        try:
            source.fetch()
        except Exception:
            log.exception("a known prefix could not be had")
            self.clear(source.slot)
        self.held[source.slot] = prompt
        return self.runner.lengths[source.slot]

    def source(self, prompt: "array[int]", idle: Iterable[int]) -> Source:
        """The best way to begin a prompt in one of `idle` slots, the longest idle first."""
        idle = list(idle)
        best = Source(0, idle[0], lambda: self.clear(idle[0]))
        for slot in range(self.runner.slots):
            length = self._common(slot, prompt)
            if length <= best.length:
                continue
            lost = self.length(slot) - length
            if slot in idle and (lost < MUCH or slot == idle[0]):
                best = self._cut(slot, length)
            elif length >= MUCH:
                best = self._fork(slot, idle[0], length)
        hit = None if self.prefixes is None else self.prefixes.find(prompt)
        if hit is not None and hit.length > best.length:
            best = self._snapshot(hit, idle[0])
        return best

    def leader(self, job: Job, prompt: "array[int]", running: Iterable[Job]) -> Job | None:
        """A running job that will absorb much more of a prompt than is known of it."""
        best, most = None, job.done + MUCH
        for other in running:
            if other.slot is None or other.decoding or other.priority > job.priority:
                continue
            shared = common(self.held[other.slot], prompt, min(other.total, len(prompt) - 1))
            if shared >= most and shared > other.done:
                best, most, job.shared = other, shared + 1, shared
        return best

    def _common(self, slot: int, prompt: "array[int]") -> int:
        """The longest prefix of a prompt, one token left to be run, that a slot can be cut to."""
        length = common(self.held[slot], prompt, min(self.length(slot), len(prompt) - 1))
        return length if length >= LEAST and self.runner.can_rewind(slot, length) else 0

    def _cut(self, slot: int, length: int) -> Source:
        return Source(length, slot, lambda: self.runner.rewind(slot, length))

    def _fork(self, source: int, target: int, length: int) -> Source:
        return Source(length, target, lambda: fork(self.runner, source, target, length))

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
