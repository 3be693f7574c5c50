"""Which prefixes are known: a radix tree over tokens, with budgets; it holds no rows itself.

A page is 128 tokens, and its key a hash of all tokens up to its end, so that a key names a prefix.
Pages that became known together are one segment, and a segment hangs on the page before its first:
a conversation is a chain of segments, and conversations that begin alike share its beginning. An
ending is a length at which a sequence can be taken up again: some pages and up to 127 tokens. Only
endings are evicted, by age and use; a segment goes with the last ending that needs it.
"""

import hashlib
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

import numpy as np

USES_COUNTED = 8

Key = bytes
P = TypeVar("P")  # what the owner keeps of a segment or an ending: bytes, a file


def page_keys(root: bytes, tokens: Sequence[int], page: int) -> list[bytes]:
    """The keys of the prefixes of 0, 1, 2 ... whole pages of `tokens`."""
    data, keys = np.asarray(tokens, np.int32), [root]
    for start in range(0, len(data) - page + 1, page):
        keys.append(_hash(keys[-1], data[start : start + page].tobytes(), b"page"))
    return keys


def ending_key(base: bytes, rest: Sequence[int]) -> bytes:
    """The key of the prefix that follows `base` with less than a page of tokens."""
    return _hash(base, np.asarray(rest, np.int32).tobytes(), b"end")


def _hash(base: bytes, tokens: bytes, what: bytes) -> bytes:
    return hashlib.blake2b(base + tokens, digest_size=16, person=what).digest()


@dataclass(eq=False)
class Segment(Generic[P]):
    """Pages first, first + 1 ... of a prefix; `keys` are theirs, `parent` is the page's before."""

    parent: bytes
    first: int
    keys: tuple[bytes, ...]
    nbytes: int
    payload: P
    users: int = 0  # endings and segments that hang on it


@dataclass(eq=False)
class Ending(Generic[P]):
    key: bytes
    base: bytes  # the key of its last whole page
    pages: int
    rest: int  # tokens after them
    nbytes: int
    payload: P
    uses: int = 0
    tick: int = 0  # when it was last used


class Tree(Generic[P]):
    """Segments and endings of at most `budget` bytes, once `evict` was called."""

    def __init__(self, root: bytes, page: int, budget: int) -> None:
        self.root, self.page, self.budget, self.nbytes = root, page, budget, 0
        self._pages: dict[bytes, tuple[Segment[P], int]] = {}  # and its number in the segment
        self._endings: dict[bytes, Ending[P]] = {}
        self._rests: defaultdict[bytes, Counter[int]] = defaultdict(Counter)  # by base
        self._tick = 0

    def __len__(self) -> int:
        return len(self._endings)

    def __contains__(self, key: bytes) -> bool:
        return key in self._endings

    def __getitem__(self, key: bytes) -> Ending[P]:
        return self._endings[key]

    def longest(self, keys: Sequence[bytes], tokens: Sequence[int]) -> Ending[P] | None:
        """The longest ending that is a proper prefix of `tokens`, whose page keys are `keys`."""
        for pages in reversed(range(len(keys))):
            start = pages * self.page
            for rest in sorted(self._rests.get(keys[pages], ()), reverse=True):
                if start + rest < len(tokens):
                    key = ending_key(keys[pages], tokens[start : start + rest])
                    if key in self._endings:
                        return self._endings[key]
        return None

    def known(self, keys: Sequence[bytes]) -> int:
        """How many pages of a sequence there are; `keys` begins with the root.

        The last one that is named tells: those before it are there, if under no name of their own.
        """
        return next(i for i in reversed(range(len(keys))) if self.has_page(keys[i]))

    def has_page(self, key: bytes) -> bool:
        return key == self.root or key in self._pages

    def path(self, base: bytes) -> list[tuple[Segment[P], int]]:
        """The segments that make up a prefix of whole pages, and how many pages of each."""
        found: list[tuple[Segment[P], int]] = []
        while base != self.root:
            segment, number = self._pages[base]
            found.append((segment, number + 1))
            base = segment.parent
        return found[::-1]

    def add_segment(self, segment: Segment[P]) -> None:
        """Its parent must be here. It stays as long as an ending needs it."""
        if segment.parent != self.root:
            self._pages[segment.parent][0].users += 1
        for number, key in enumerate(segment.keys):
            self._pages.setdefault(key, (segment, number))
        self.nbytes += segment.nbytes

    def add_ending(self, ending: Ending[P]) -> None:
        """Its pages must be here, itself not."""
        if ending.base != self.root:
            self._pages[ending.base][0].users += 1
        self._endings[ending.key] = ending
        self._rests[ending.base][ending.rest] += 1
        self.nbytes += ending.nbytes
        self._now(ending)

    def touch(self, ending: Ending[P]) -> None:
        """It was used: others are evicted before it, the more so the more often it was."""
        ending.uses += 1
        self._now(ending)

    def _now(self, ending: Ending[P]) -> None:
        self._tick += 1
        ending.tick = self._tick

    def evict(self) -> list[Segment[P] | Ending[P]]:
        """Drop endings until the budget is kept; what is gone."""
        gone: list[Segment[P] | Ending[P]] = []
        while self.nbytes > self.budget and self._endings:
            gone += self.remove(min(self._endings.values(), key=self._worth))
        return gone

    def _worth(self, ending: Ending[P]) -> float:
        """Each use makes up for an age of half as many endings as there are."""
        return ending.tick + min(ending.uses, USES_COUNTED) * len(self._endings) / 2

    def remove(self, ending: Ending[P]) -> list[Segment[P] | Ending[P]]:
        """Drop an ending and the segments that only it needed; all that is gone."""
        del self._endings[ending.key]
        rests = self._rests[ending.base]
        rests[ending.rest] -= 1
        if not rests[ending.rest]:
            del rests[ending.rest]
        if not rests:
            del self._rests[ending.base]
        self.nbytes -= ending.nbytes
        return [ending, *self._release(ending.base)]

    def remove_segment(self, segment: Segment[P]) -> list[Segment[P] | Ending[P]]:
        """Drop every ending that needs a segment, and it with them; all that is gone."""
        needing = [
            ending
            for ending in self._endings.values()
            if any(part is segment for part, _ in self.path(ending.base))
        ]
        return [gone for ending in needing for gone in self.remove(ending)]

    def prune(self) -> list[Segment[P]]:
        """Drop segments that nothing needs, as a crash may leave them; what is gone."""
        idle = {id(s): s for s, _ in self._pages.values() if not s.users}
        return [gone for segment in idle.values() for gone in self._drop(segment)]

    def _release(self, base: bytes) -> list[Segment[P]]:
        if base == self.root:
            return []
        segment = self._pages[base][0]
        segment.users -= 1
        return [] if segment.users else self._drop(segment)

    def _drop(self, segment: Segment[P]) -> list[Segment[P]]:
        for key in segment.keys:
            if self._pages.get(key, (None, 0))[0] is segment:
                del self._pages[key]
        self.nbytes -= segment.nbytes
        return [segment, *self._release(segment.parent)]
