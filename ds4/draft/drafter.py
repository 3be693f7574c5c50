"""What a drafter is: it guesses the next tokens of sequences, and `verify` keeps what is right.

A guess decides how fast text comes, never what it says.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from ..cache import LayerCache
from ..model import Watch
from ..sampler import Sampler
from ..step import Step


@dataclass(frozen=True)
class Ask:
    """A sequence to be continued by up to `count` guesses."""

    slot: int
    text: Sequence[int]  # all its tokens; the model has not seen the last one yet
    count: int
    sampler: Sampler


class Drafter(Protocol):
    """`cache` and `near`, and so `watch`, are of drafters that read what the model computes."""

    name: str
    longest: int  # guesses at once
    cache: list[LayerCache]
    near: int  # how many rows at the end of each chunk it watches; 0: it does not watch

    def watch(self, step: Step) -> Watch:
        """What sees the streams of a step on the device, layer after layer."""

    def propose(self, asks: Sequence[Ask]) -> list[list[int]]:
        """Guesses for each, at most as many as it asked for; none is a guess too."""
