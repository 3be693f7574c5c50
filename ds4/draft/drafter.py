"""What a drafter is: it guesses the next tokens of sequences, and `verify` keeps what is right.

A guess decides how fast text comes, never what it says.
"""

import itertools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from ..backend import Array, Weights
from ..cache import LayerCache
from ..model import Watch
from ..runner import Runner
from ..sampler import Row, Sampler, pick, rule_of, uniform, weighed
from ..step import Step
from .operations import DraftBackend


@dataclass(frozen=True)
class Ask:
    """A sequence to be continued by up to `count` guesses.

    by_rejection  its guesses will be taken or not by how likely they were: they are drawn by random
                  numbers of their own. Else by those that will choose the tokens
    """

    slot: int
    text: Sequence[int]  # all its tokens; the model has not seen the last one yet
    count: int
    sampler: Sampler
    by_rejection: bool = False


@dataclass(frozen=True)
class Draft:
    """Guesses for each who asked, at most as many as it asked for; none is a guess too.

    chances  if someone asked for guesses by rejection: of each place, (asks, V) on the device, what
             its guesses were drawn from, or of all places one after another. Empty: they were not
             drawn
    sure     of each, how likely the drafter says each guess is right, if those before it are, by
             what it knew before it drew the guess. Empty: it does not say
    """

    guesses: list[list[int]]
    chances: Sequence[Array] = ()
    sure: Sequence[Sequence[float]] = ()

    def cut(self, counts: Sequence[int]) -> "Draft":
        """With so many guesses for each."""
        cut = [guess[:count] for guess, count in zip(self.guesses, counts, strict=True)]
        return replace(self, guesses=cut)


_EXACT = 1 << 24  # more than any vocabulary, and exact in float32
Choose = Callable[[Array], Array]  # logits (R, V) -> tokens (R,), on the device


class Drafter(Protocol):
    """`cache` and `near`, and so `watch`, are of drafters that read what the model computes."""

    name: str
    longest: int  # guesses at once
    cache: list[LayerCache]
    near: int  # how many rows at the end of each chunk it watches; 0: it does not watch

    def watch(self, step: Step) -> Watch:
        """What sees the streams of a step on the device, layer after layer."""

    def propose(self, asks: Sequence[Ask]) -> Draft: ...

    def follow(self, step: Step) -> Any:
        """Run a step that another process has planned for its drafter."""


class Own:
    """What the checkpoints' own drafters have in common: they read the model's streams.

    A draft may be one function of a step, which a backend may record as it does the model's steps:
    the host then launches it at once, and waits only for its guesses.
    """

    def __init__(self, runner: Runner, own: Weights) -> None:
        be: Any = runner.be
        self.be: DraftBackend = be
        self.cfg, self.target, self.own = runner.cfg, runner.weights, own
        self.near = runner.cfg.sliding_window
        self._led = runner.led  # other processes repeat what is drafted here
        self._forward = be.capture(self.forward)
        self._whole = be.capture(self.whole)

    def forward(self, step: Step) -> Any:
        """A step of drafting, on the device."""
        raise NotImplementedError

    def whole(self, step: Step) -> Any:
        """All forwards of a draft, and its guesses by the step's `draws`, on the device."""
        raise NotImplementedError

    def at_once(self, step: Step, asks: Sequence[Ask]) -> Any:
        """The same of a host Step; `last` has as many rows as there are to be guesses."""
        draws = draws_of(asks, len(step.last) // len(asks))
        return self._whole(replace(step, before=step.pos - 1, draws=draws))

    def is_whole(self, asks: Sequence[Ask]) -> bool:
        """Whether `whole` draws what these ask for: without penalties, and here alone."""
        return self._led is None and not any(ask.sampler.adjusts for ask in asks)

    def chances(self, asks: Sequence[Ask], logits: Callable[[], Array]) -> list[Array]:
        """What guesses were drawn from, if by rejection, of logits of place after place."""
        if not any(ask.by_rejection for ask in asks):
            return []
        seen, rows = logits(), list[Row]((ask.sampler, len(ask.text)) for ask in asks)
        return [self.be.chances(*weighed(self.be, seen, rows * (len(seen) // len(asks))))]

    def chooser(self, step: Step) -> Choose:
        """How guesses are chosen on the device, place after place."""
        be, draws = self.be, step.draws
        if draws is None:
            return be.best
        last = len(draws) - 1  # again for a row that is only company (backends/cuda/graph.py)
        places = itertools.chain(range(last), itertools.repeat(last))
        return lambda logits: be.drawn(logits, draws[next(places)])

    def step(self, step: Step) -> Any:
        """The same of a host Step, on every rank."""
        return self.follow(step if self._led is None else self._led.step(step, drafting=True))

    def follow(self, step: Step) -> Any:
        return self._forward(replace(step, before=step.pos - 1))


def draws_of(asks: Sequence[Ask], places: int) -> NDArray[np.float32] | None:
    """A step's `draws`, (places, 4 or 5, asks and padding): see DraftBackend.drawn. None: greedy.

    Of each place whole 16 bytes, as arrays of their own have (backends/cuda/graph.py).
    """
    if not any(ask.sampler.params.temperature for ask in asks):
        return None
    rules = [rule_of(ask.sampler.params) for ask in asks]
    limited = any(top_k for _, top_k, _, _ in rules)
    draws = np.zeros((places, 4 + limited, -(-len(asks) // 4) * 4), np.float32)
    mine = draws[:, :, : len(asks)]
    mine[:, :3] = np.array([(heat, *cuts) for heat, _, *cuts in rules], np.float32).T
    mine[:, 3] = [[_random(ask, len(ask.text) + place) for ask in asks] for place in range(places)]
    if limited:
        mine[:, 4] = [min(top_k, _EXACT) for _, top_k, _, _ in rules]
    return draws


def _random(ask: Ask, position: int) -> float:
    if not ask.sampler.params.temperature:
        return 0.0
    return uniform(ask.sampler.seed, position, "guess" if ask.by_rejection else "choose")


class Drawing:
    """The guesses for all who asked, place after place, drawn from logits; then a Draft."""

    def __init__(self, be: DraftBackend, asks: Sequence[Ask]) -> None:
        self._be, self._asks = be, asks
        self._guesses: list[Array] = []
        self._chances: list[Array] = []

    def next(self, logits: Array) -> Array:
        """(asks, V) -> (asks,) tokens, on the device."""
        at = len(self._guesses)
        rows: list[Row] = [(ask.sampler, len(ask.text) + at) for ask in self._asks]
        draws = [_random(ask, len(ask.text) + at) for ask in self._asks]
        self._guesses.append(pick(self._be, logits, rows, draws=draws))
        if any(ask.by_rejection for ask in self._asks):
            self._chances.append(self._be.chances(*weighed(self._be, logits, rows)))
        return self._guesses[-1]

    def draft(self, confidence: Sequence[Array] = ()) -> Draft:
        """Here the host waits. `confidence`: logits (asks,) of each place, if there are any."""
        guesses = [self._be.download(tokens) for tokens in self._guesses]
        sure = [self._be.download(logits) for logits in confidence]
        return drafted(self._asks, guesses, sure, self._chances)


def drafted(
    asks: Sequence[Ask],
    guesses: Iterable[Any],
    confidence: Iterable[Any] = (),
    chances: Sequence[Array] = (),
) -> Draft:
    """Of guesses and confidence logits of each place, (asks,) on the host."""
    sure = [(1 + np.tanh(logits / 2)) / 2 for logits in confidence]
    draft = Draft(_by_ask(guesses), chances, _by_ask(sure))
    return draft.cut([ask.count for ask in asks])


def _by_ask(places: Iterable[Any]) -> list[list[Any]]:
    return [list(row) for row in np.array([*places]).T.tolist()]
