"""DSpark, the block drafter of the 0731 release (spec, Appendix A).

Three stages read a block of five tokens, the last known one and four of noise, all of which see
each other and what the model left of the 128 positions before. A small table of which token follows
which then turns their five distributions into a text, one token after another.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from .. import model
from ..backend import Array, Weights
from ..cache import LayerCache, window_cache
from ..runner import Runner
from ..step import Chunk, Step, plan
from .drafter import Ask, Choose, Draft, Drawing, Own, drafted

FEW = 2  # places that a draft for several texts has at most, if not all


class Dspark(Own):
    """Guesses a block at once, and says how sure it is of each guess."""

    name = "dspark"

    def __init__(self, runner: Runner, own: Weights) -> None:
        super().__init__(runner, own)
        self.longest = self.cfg.dspark.block_size
        sizes = self.cfg, runner.slots, runner.max_chunk
        self.cache: list[LayerCache] = [window_cache(self.be, *sizes) for _ in own.layers]

    def watch(self, step: Step) -> model.Watch:
        """Keeps a key-value row of each position for each stage, made of some layers' streams."""
        taps: dict[int, Array] = {}

        def see(number: int, h: Array) -> None:
            be, layers = self.be, self.cfg.dspark.target_layers
            near = step.near or step
            if number in layers:
                taps[number] = be.tap(be.take(h, near.last) if step.near else h)
            if number != max(layers):
                return
            parts, own = [taps[layer] for layer in layers], self.own
            c = be.fuse(own.main_proj, own.main_norm, parts, self.cfg.rms_norm_eps)
            for stage, cache in zip(own.layers, self.cache, strict=True):
                be.remember(stage.attn, cache, near, be.linear(stage.attn.wkv, c), [], self.cfg)

        return see

    def forward(self, step: Step) -> tuple[Array, Array]:
        """Blocks of tokens -> of the wanted rows logits (R, V), and the hidden states (R, D) that
        these come from."""
        be, cfg = self.be, self.cfg
        h = be.embed(self.target.embed, step.tokens, cfg.hc_mult)
        for w, cache in zip(self.own.layers, self.cache, strict=True):
            x, mix = be.hc_pre(w.hc_attn, w.attn_norm, h, cfg)
            h = be.hc_post(self._attention(w.attn, cache, step, x), h, mix)
            x, mix = be.hc_pre(w.hc_ffn, w.ffn_norm, h, cfg)
            h = be.hc_post(model.moe(be, cfg, w.ffn, step, x), h, mix)
        wanted = be.hc_head(self.own.hc_head, be.take(h, step.last), cfg)
        logits = be.linear(self.target.head, be.rms_norm(self.own.norm, wanted, cfg.rms_norm_eps))
        return logits, be.take(be.hc_head(self.own.hc_head, h, cfg), step.last)

    def _attention(self, w: Weights, cache: LayerCache, step: Step, x: Array) -> Array:
        be, cfg = self.be, self.cfg
        qa, kv = be.linears([w.wq_a, w.wkv], x)
        q = be.linear(w.wq_b, be.rms_norm(w.q_norm, qa, cfg.rms_norm_eps))
        q = q.reshape(len(q), -1, cfg.head_dim)  # all heads, or this rank's
        o = be.attend_block(w, cache.window, step, q, kv, cfg.dspark.block_size, cfg)
        o = be.grouped_linear(w.wo_a, o.reshape(len(o), -1, cfg.group_width))
        return be.linear(w.wo_b, o.reshape(len(o), -1))

    def propose(self, asks: Sequence[Ask]) -> Draft:
        be, size, noise = self.be, self.cfg.dspark.block_size, self.cfg.dspark.noise_token
        blocks = [
            Chunk(ask.slot, len(ask.text) - 1, [ask.text[-1]] + [noise] * (size - 1))
            for ask in asks
        ]
        places = min(size, max(ask.count for ask in asks))
        step = plan(blocks, [], every_row=True)
        rows = step.last.reshape(-1, size).T.reshape(-1)  # place after place, not block after block
        if self.is_whole(asks):
            # few shapes of several texts: to record one takes longer than places nobody asked for
            most = places if places <= FEW or len(asks) == 1 else size
            said = self.at_once(replace(step, last=rows[: most * len(asks)]), asks)
            guesses, sure, *others = (x[: places * len(asks)] for x in said)
            guesses, sure = be.coming(guesses), be.coming(sure)
            chances = self.chances(asks, lambda: be.markov(self.own, *others)[0])
            words = be.download(sure).reshape(places, -1)
            return drafted(asks, be.download(guesses).reshape(places, -1), words, chances)
        logits, hidden = self.step(replace(step, last=rows))
        drawing = Drawing(be, asks)
        tokens: Any = be.upload(np.array([ask.text[-1] for ask in asks], np.int32))
        _, said = self._chain(logits[: places * len(asks)], hidden, tokens, drawing.next)
        return drawing.draft(said)

    def whole(self, step: Step) -> tuple[Array, ...]:
        """Guesses, logits of how sure each is, what `forward` says, and the tokens before each."""
        be, blocks = self.be, len(step.tokens) // self.cfg.dspark.block_size
        first = be.take(step.tokens, step.last[:blocks])
        base, hidden = self.forward(step)
        guesses, sure = self._chain(base, hidden, first, self.chooser(step))
        return be.joined(guesses), be.joined(sure), base, hidden, be.joined([first, *guesses[:-1]])

    def _chain(
        self, base: Array, hidden: Array, tokens: Array, choose: Choose
    ) -> tuple[list[Array], list[Array]]:
        """Guesses, and logits of how sure each is, (blocks,) for each place that `base` has."""
        guesses, sure, blocks = list[Array](), list[Array](), len(tokens)
        for first in range(0, len(base), blocks):
            rows = slice(first, first + blocks)
            logits, confidence = self.be.markov(self.own, base[rows], hidden[rows], tokens)
            tokens = choose(logits)
            guesses.append(tokens)
            sure.append(confidence)
        return guesses, sure
