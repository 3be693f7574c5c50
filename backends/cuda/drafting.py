"""What drafters ask for, in PyTorch's operations."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ds4.backend import Weights
from ds4.config import Config
from ds4.step import Step

from .attending import largest
from .weights import Weight, dense

NEVER = float("-inf")
ALMOST = 1 - 2**-23  # of a sum: what is below it in float32, too
AT_ONCE = 16  # rows of logits


class Weighing:
    """What becomes of guesses, and what taking them by rejection needs."""

    def chances(
        self, logits: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor
    ) -> Tensor:
        made, rules = torch.empty_like(logits), (temperature, top_k, top_p, min_p)
        for rows in _parts(logits):
            made[rows] = _chances(logits[rows], *(x[rows, None] for x in rules))
        return made

    def settle(self, p: Tensor, q: Tensor, guesses: Tensor, accept: Tensor, draw: Tensor) -> Tensor:
        given = p, q, guesses, accept, draw
        return torch.cat([_settled(*(x[rows] for x in given)) for rows in _parts(p)])

    def joined(self, parts: Sequence[Tensor]) -> Tensor:
        return torch.cat([*parts])


def _parts(logits: Tensor) -> list[slice]:
    """Rows that are taken together: what sorting makes of a row is many times what it is."""
    return [slice(first, first + AT_ONCE) for first in range(0, len(logits), AT_ONCE)]


def _chances(
    logits: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor
) -> Tensor:
    ordered, order = logits.sort(dim=-1, descending=True, stable=True)
    place = torch.arange(logits.shape[-1], device=logits.device)
    beyond = (top_k > 0) & (place >= top_k)
    beyond |= (temperature == 0) & (place > 0)
    p = (ordered / temperature.clamp_min(1e-6)).masked_fill(beyond, NEVER).softmax(-1)
    kept = (p.cumsum(-1) - p < top_p) & (p >= min_p * p[:, :1])
    p = p.masked_fill(~kept, 0)
    return torch.zeros_like(p).scatter(-1, order, p / p.sum(-1, keepdim=True))


def _settled(p: Tensor, q: Tensor, guesses: Tensor, accept: Tensor, draw: Tensor) -> Tensor:
    at, guessed = guesses.clamp_min(0).long()[:, None], guesses[:, None] >= 0
    kept = guessed[:, 0] & (accept * q.gather(-1, at)[:, 0] < p.gather(-1, at)[:, 0])
    rest = torch.where(guessed, (p - q).clamp_min(0), p)
    rest = torch.where(rest.any(-1, keepdim=True), rest, p)  # p is q but for rounding
    running = rest.cumsum(-1)
    total = running[:, -1:]
    drawn = (running <= torch.minimum(draw[:, None] * total, total * ALMOST)).sum(-1)
    return torch.where(kept, guesses, drawn.to(guesses.dtype))


class Drafting(Weighing):
    """For a backend that has rms_norm, linear, _rope and _rounded."""

    def streams(self, h: Tensor) -> Tensor:
        return h.flatten(1)

    def tap(self, h: Tensor) -> Tensor:
        return h.mean(1)

    def recall(self, ring: Any, step: Step) -> Tensor:
        at = torch.where(step.pos < 0, ring.size, step.pos % ring.size)
        rows: Tensor = ring.data[step.slot, at]
        return rows

    def join(self: Any, w: Weights, embed: Weight, step: Step, x: Tensor, cfg: Config) -> Tensor:
        e = self.rms_norm(w.enorm, dense(embed[step.tokens]), cfg.rms_norm_eps)
        x = self.rms_norm(w.hnorm, x.unflatten(1, (cfg.hc_mult, -1)), cfg.rms_norm_eps)
        joined: Tensor = self.linear(w.e_proj, e)[:, None] + self.linear(w.h_proj, x)
        return joined

    def fuse(self: Any, proj: Weight, norm: Tensor, parts: Sequence[Tensor], eps: float) -> Tensor:
        fused: Tensor = self.rms_norm(norm, self.linear(proj, torch.cat(list(parts), -1)), eps)
        return fused

    def attend_block(
        self: Any,
        w: Weights,
        ring: Any,
        step: Step,
        q: Tensor,
        kv: Tensor,
        size: int,
        cfg: Config,
    ) -> Tensor:
        window, eps = cfg.sliding_window, cfg.rms_norm_eps
        kv = self.rms_norm(w.kv_norm, kv, eps)
        kv = self._rounded(ring, self._rope(kv, step.pos, w.freqs)).unflatten(0, (-1, size))
        q = self._rope(self.rms_norm(None, q, eps), step.pos, w.freqs)
        start, slot = (x.view(-1, size)[:, :1] for x in (step.pos, step.slot))
        at = start - window + torch.arange(window, device=self.device)
        past = ring.data[slot, at % ring.size].masked_fill((at < 0)[..., None], 0)
        keys = torch.cat([past, kv], 1)  # (blocks, window + size, C)
        unseen = F.pad(at < 0, (0, size))[:, None, None]
        logits = torch.einsum("bsnc,bkc->bsnk", q.unflatten(0, (-1, size)), keys)
        logits = (logits * q.shape[-1] ** -0.5).masked_fill(unseen, NEVER)
        sink = w.attn_sink[:, None].expand(*logits.shape[:3], 1)
        share = torch.cat([logits, sink], -1).softmax(-1)[..., :-1]
        o = torch.einsum("bsnk,bkc->bsnc", share, keys).flatten(0, 1)
        turned: Tensor = self._rope(o, step.pos, w.freqs, inverse=True)
        return turned

    def markov(
        self: Any, w: Weights, base: Tensor, hidden: Tensor, tokens: Tensor
    ) -> tuple[Tensor, Tensor]:
        rows = dense(w.w1[tokens])
        confidence = self.linear(w.confidence, torch.cat([hidden, rows], -1))
        return base + self.linear(w.w2, rows), confidence[:, 0]

    def best(self, logits: Tensor) -> Tensor:
        return largest(logits, 1)[1][:, 0]

    def drawn(self: Any, logits: Tensor, how: Tensor) -> Tensor:
        temperature, top_p, min_p, u, *more = (x[: len(logits)] for x in how)
        top_k = (more[0] if more else 0 * u).int()
        picked: Tensor = self.sample(logits, temperature, top_k, top_p, min_p, u)
        return picked

    def coming(self, x: Tensor) -> Tensor:
        return x
