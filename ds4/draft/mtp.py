"""The MTP block: one more layer that reads the model's last streams and the next token (spec 3.12).

Slot i joins the streams of position i with the token at i + 1, and says the token at i + 2. The
model's own steps leave what later slots look back to: streams, and the slots' key-value rows, both
by position, so that nothing has to be undone when guesses were wrong.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from .. import model
from ..backend import Array, Weights
from ..cache import LayerCache, stream_rows, window_cache
from ..runner import Runner
from ..step import Step, plan_decode, span
from .drafter import Ask, Choose, Draft, Drawing, Own, drafted


class Mtp(Own):
    """Guesses one token after another; trained for the first, it is seldom right far on."""

    name = "mtp"
    longest = 3

    def __init__(self, runner: Runner, own: Weights) -> None:
        super().__init__(runner, own)
        be, cfg, slots = self.be, self.cfg, runner.slots
        streams = be.alloc("float", slots, stream_rows(cfg), cfg.hc_mult * cfg.hidden_size)
        window = window_cache(be, cfg, slots, runner.max_chunk)
        self.cache: list[LayerCache] = [replace(window, streams=streams)]

    def watch(self, step: Step) -> model.Watch:
        """Keeps the last layer's streams, and the key-value rows of slots that they complete."""

        def see(number: int, h: Array) -> None:
            if number < self.cfg.num_hidden_layers - 1:
                return
            be, cfg, (cache,), layer = self.be, self.cfg, self.cache, self.own.layers[0]
            near = step.near or step
            h = be.take(h, near.last) if step.near else h
            be.write(cache.streams, be.streams(h), near)
            slots = replace(near, pos=near.before)
            x, _ = be.hc_pre(layer.hc_attn, layer.attn_norm, self._joined(slots), cfg)
            be.remember(layer.attn, cache, slots, be.linear(layer.attn.wkv, x), [], cfg)

        return see

    def forward(self, step: Step) -> Array:
        """Tokens (T,) at their positions -> logits (T, V) of what follows each.

        The streams before them are the model's, or those that this block left for its guesses.
        """
        be, cfg, (cache,) = self.be, self.cfg, self.cache
        slots = replace(step, pos=step.before)
        z = model.block(be, cfg, self.own.layers[0], cache, slots, self._joined(slots))
        be.write(cache.streams, be.streams(z), step)
        x = be.hc_head(self.own.hc_head, z, cfg)
        return be.linear(self.target.head, be.rms_norm(self.own.norm, x, cfg.rms_norm_eps))

    def _joined(self, slots: Step) -> Array:
        streams = self.be.recall(self.cache[0].streams, slots)
        return self.be.join(self.own, self.target.embed, slots, streams, self.cfg)

    def propose(self, asks: Sequence[Ask]) -> Draft:
        tokens: Any = np.array([ask.text[-1] for ask in asks], np.int32)
        slots, at = [ask.slot for ask in asks], [len(ask.text) - 1 for ask in asks]
        places = min(self.longest, max(ask.count for ask in asks))
        step = plan_decode(tokens, slots, at, [], len(slots))
        step = replace(step, span=span(max(at) + places))
        if self.is_whole(asks):
            wanted = replace(step, last=np.tile(step.last, places))  # a row for each guess
            guesses, *logits = self.at_once(wanted, asks)
            guesses = self.be.coming(guesses)
            chances = self.chances(asks, lambda: self.be.joined(logits))
            return drafted(asks, self.be.download(guesses).reshape(places, -1), (), chances)
        drawing = Drawing(self.be, asks)
        self._chain(step, places, self.step, drawing.next)
        return drawing.draft()

    def whole(self, step: Step) -> tuple[Array, ...]:
        """Guesses, and for each place what they were chosen from."""
        places, choose, logits = len(step.last) // len(step.tokens), self.chooser(step), []

        def chosen(one: Array) -> Array:
            logits.append(one)
            return choose(one)

        guesses = self._chain(step, places, self.forward, chosen)
        return self.be.joined(guesses), *logits

    def _chain(
        self, step: Step, places: int, forward: Callable[[Step], Array], choose: Choose
    ) -> list[Array]:
        """A guess of each sequence after another, (asks,) each: read by the next step."""
        guesses = []
        for _ in range(places):
            guesses.append(choose(forward(step)))
            step = replace(step, tokens=guesses[-1], pos=step.pos + 1, before=step.pos)
        return guesses
