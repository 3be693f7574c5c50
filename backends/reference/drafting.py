"""What drafters ask for, in plain NumPy."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ds4.backend import Weights
from ds4.config import Config
from ds4.step import Step

Array = NDArray[Any]
f32 = np.float32
ALMOST = f32(1 - 2**-23)  # of a sum: what is below it in float32, too


class Drafting:
    """For a backend that has rms_norm, linear, _rope and _rounded."""

    def streams(self, h: Array) -> Array:
        return h.reshape(len(h), -1)

    def tap(self, h: Array) -> Array:
        return h.mean(1)

    def recall(self: Any, ring: Any, step: Step) -> Array:
        return ring.data[step.slot, np.where(step.pos < 0, ring.size, step.pos % ring.size)]

    def join(self: Any, w: Weights, embed: Array, step: Step, x: Array, cfg: Config) -> Array:
        e = self.linear(w.e_proj, self.rms_norm(w.enorm, embed[step.tokens], cfg.rms_norm_eps))
        x = self.rms_norm(w.hnorm, x.reshape(len(x), cfg.hc_mult, -1), cfg.rms_norm_eps)
        return e[:, None] + x @ w.h_proj.T

    def fuse(self: Any, proj: Array, norm: Array, parts: Sequence[Array], eps: float) -> Array:
        return self.rms_norm(norm, self.linear(proj, np.concatenate(parts, -1)), eps)

    def attend_block(
        self: Any,
        w: Weights,
        ring: Any,
        step: Step,
        q: Array,
        kv: Array,
        size: int,
        cfg: Config,
    ) -> Array:
        kv = self.rms_norm(w.kv_norm, kv, cfg.rms_norm_eps)
        kv = self._rounded(ring, self._rope(kv, step.pos, w.freqs))
        q = self._rope(self.rms_norm(None, q, cfg.rms_norm_eps), step.pos, w.freqs)
        out, scale = np.zeros_like(q), f32(q.shape[-1] ** -0.5)
        for first in range(0, len(q), size):
            block, start = slice(first, first + size), step.pos[first]
            at = np.arange(max(0, start - cfg.sliding_window), max(0, start))
            keys = np.concatenate([ring.data[step.slot[first], at % ring.size], kv[block]])
            logits = q[block] @ keys.T * scale
            sink = np.broadcast_to(w.attn_sink[:, None], (*logits.shape[:2], 1))
            logits = np.concatenate([logits, sink], -1)
            share = np.exp(logits - logits.max(-1, keepdims=True))
            out[block] = (share / share.sum(-1, keepdims=True))[..., :-1] @ keys
        return self._rope(out, step.pos, w.freqs, inverse=True)

    def markov(
        self: Any, w: Weights, base: Array, hidden: Array, tokens: Array
    ) -> tuple[Array, Array]:
        rows = w.w1[tokens]
        confidence = np.concatenate([hidden, rows], -1) @ w.confidence.T
        return base + rows @ w.w2.T, confidence[:, 0]

    def best(self, logits: Array) -> Array:
        return logits.argmax(-1)

    def drawn(self: Any, logits: Array, how: Array) -> Array:
        temperature, top_k, top_p, min_p, u = (x[: len(logits)] for x in how)
        picked: Array = self.sample(logits, temperature, top_k.astype(np.int32), top_p, min_p, u)
        return picked

    def joined(self, parts: Sequence[Array]) -> Array:
        return np.concatenate(parts)

    def coming(self, x: Array) -> Array:
        return x

    def chances(
        self, logits: Array, temperature: Array, top_k: Array, top_p: Array, min_p: Array
    ) -> Array:
        found = np.zeros_like(logits)
        found[np.arange(len(logits)), logits.argmax(-1)] = 1
        for r in np.nonzero(temperature > 0)[0]:
            order = np.argsort(-logits[r], kind="stable")[: top_k[r] or None]
            p = np.exp((logits[r, order] - logits[r, order[0]]) / temperature[r])
            p /= p.sum()
            p = p[(p.cumsum() - p < top_p[r]) & (p >= min_p[r] * p[0])]
            found[r] = 0
            found[r, order[: len(p)]] = p / p.sum()
        return found

    def settle(self, p: Array, q: Array, guesses: Array, accept: Array, draw: Array) -> Array:
        at = np.arange(len(p)), np.maximum(guesses, 0)
        kept = (guesses >= 0) & (accept * q[at] < p[at])
        rest = np.where(guesses[:, None] >= 0, np.maximum(p - q, 0), p)
        rest = np.where(rest.any(-1, keepdims=True), rest, p)  # p is q but for rounding
        running = rest.cumsum(-1)
        most = running[:, -1:] * ALMOST
        drawn = (running <= np.minimum(draw[:, None] * running[:, -1:], most)).sum(-1)
        return np.where(kept, guesses, drawn).astype(np.int32)
