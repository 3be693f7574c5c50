"""What drafters ask for, in MLX operations."""

from collections.abc import Sequence
from typing import Any

import mlx.core as mx
import numpy as np

from ds4.backend import Weights
from ds4.config import Config
from ds4.step import Step

from .facts import rotate
from .rows import Rows, row
from .weights import Matrix

NEVER = -float("inf")


class Drafting:
    """For a backend that has rms_norm, linear and _facts."""

    def streams(self, h: mx.array) -> mx.array:
        return h.flatten(1)

    def tap(self, h: mx.array) -> mx.array:
        return h.mean(1)

    def recall(self: Any, ring: Rows, step: Step) -> mx.array:
        facts = self._facts(step)
        return ring.data[mx.array(facts.slot), mx.array(facts.ring_rows(ring.size))]

    def join(
        self: Any, w: Weights, embed: Matrix, step: Step, x: mx.array, cfg: Config
    ) -> mx.array:
        e = self.rms_norm(w.enorm, embed.rows(step.tokens), cfg.rms_norm_eps)
        x = self.rms_norm(w.hnorm, x.reshape(len(x), cfg.hc_mult, -1), cfg.rms_norm_eps)
        return w.e_proj.matmul(e)[:, None] + w.h_proj.matmul(x)

    def fuse(
        self: Any, proj: Matrix, norm: mx.array, parts: Sequence[mx.array], eps: float
    ) -> mx.array:
        fused: mx.array = self.rms_norm(norm, proj.matmul(mx.concatenate([*parts], -1)), eps)
        return fused

    def attend_block(
        self: Any,
        w: Weights,
        ring: Rows,
        step: Step,
        q: mx.array,
        kv: mx.array,
        size: int,
        cfg: Config,
    ) -> mx.array:
        facts, window = self._facts(step), cfg.sliding_window
        turn, scale = facts.rotation(w.freqs), cfg.head_dim**-0.5
        kv = row(kv, w.kv_norm, turn, cfg.rms_norm_eps, ring.form).reshape(-1, size, cfg.head_dim)
        q = rotate(self.rms_norm(None, q, cfg.rms_norm_eps), turn)
        at = facts.pos[::size, None] - window + np.arange(window)
        rows = mx.array(facts.slot[::size, None] * (ring.size + 1) + at % ring.size)
        unseen = mx.array(at < 0)
        past = mx.where(unseen[..., None], 0, ring.data.flatten(0, 1)[rows])
        keys = mx.concatenate([past, kv], 1)  # (blocks, window + size, C)
        hidden = mx.pad(unseen, [(0, 0), (0, size)])[:, None, None]
        q = q.reshape(-1, size, *q.shape[1:])
        logits = mx.where(hidden, NEVER, q @ keys.swapaxes(1, 2)[:, None] * scale)
        sink = mx.broadcast_to(w.attn_sink[:, None], (*logits.shape[:3], 1))
        share = mx.softmax(mx.concatenate([logits, sink], -1), -1)[..., :-1]
        o = (share @ keys[:, None]).flatten(0, 1)
        return rotate(o, facts.rotation(w.freqs, inverse=True))

    def markov(
        self: Any, w: Weights, base: mx.array, hidden: mx.array, tokens: mx.array
    ) -> tuple[mx.array, mx.array]:
        rows = w.w1.rows(tokens)
        confidence = w.confidence.matmul(mx.concatenate([hidden, rows], -1))
        return base + w.w2.matmul(rows), confidence[:, 0]

    def best(self, logits: mx.array) -> mx.array:
        return mx.argmax(logits, -1)

    def drawn(self: Any, logits: mx.array, how: mx.array) -> mx.array:
        temperature, top_k, top_p, min_p, u = (x[: len(logits)] for x in how)
        picked: mx.array = self.sample(logits, temperature, top_k.astype(mx.int32), top_p, min_p, u)
        return picked

    def joined(self, parts: Sequence[mx.array]) -> mx.array:
        return mx.concatenate([*parts])

    def coming(self, x: mx.array) -> mx.array:
        mx.async_eval(x)
        return x
