"""Prompt look-up: what followed the last tokens earlier in the text may follow again.

It needs no weights and no time, and is right where text repeats: code being edited, quotations,
tables, tool calls.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

from ..cache import LayerCache
from ..model import Watch
from ..step import Step
from .drafter import Ask, Draft

LENGTHS = (4, 3, 2)  # of the run of tokens that must have occurred before; the longest is believed
REACH = 1 << 17  # tokens of a prompt that are read, its last: 0.2 s, in which all wait, and 80 MB
SURE = 8  # tokens compared to tell that a slot still holds the text that was read


@dataclass
class _Seen:
    """Where each run of tokens was followed by what comes `end` tokens into the text."""

    ends: dict[tuple[int, ...], int] = field(default_factory=dict)
    read: int = 0
    last: tuple[int, ...] = ()

    def follow(self, text: Sequence[int]) -> None:
        """Read what is new of a text; if it is another one, all of it."""
        if self.read > len(text) or tuple(text[max(0, self.read - SURE) : self.read]) != self.last:
            self.ends, self.read = {}, 0
        first = max(self.read, 1, len(text) - REACH)
        for end in range(first, len(text)):  # a run that ends the text says nothing
            for length in LENGTHS:
                if end >= length:
                    self.ends[tuple(text[end - length : end])] = end
        self.read = len(text)
        self.last = tuple(text[max(0, self.read - SURE) :])


class Lookup:
    """Guesses what followed the longest run of last tokens when it last occurred."""

    name = "lookup"
    near = 0

    def __init__(self, longest: int = 8) -> None:
        self.longest = longest
        self.cache: list[LayerCache] = []
        self._seen: dict[int, _Seen] = {}

    def watch(self, step: Step) -> Watch:
        raise AssertionError("it does not watch")

    def propose(self, asks: Sequence[Ask]) -> Draft:
        return Draft([self._guess(ask) for ask in asks])

    def follow(self, step: Step) -> None:
        raise AssertionError("it has no steps")

    def _guess(self, ask: Ask) -> list[int]:
        seen, text = self._seen.setdefault(ask.slot, _Seen()), ask.text
        seen.follow(text)
        for length in LENGTHS:
            if len(text) > length and (end := seen.ends.get(tuple(text[-length:]))):
                return list(text[end : end + min(ask.count, self.longest)])
        return []
