"""What becomes of logits, in MLX operations: masks, penalties, draws, guesses that are settled."""

import mlx.core as mx

from .ranks import Ranks

NEVER = -float("inf")
ALMOST = 1 - 2**-23  # of a sum: what is below it in float32, too


class Choosing:
    """For a backend that has ranks."""

    ranks: Ranks

    def mask(self, logits: mx.array, allowed: mx.array) -> mx.array:
        bits = (allowed[:, :, None] >> mx.arange(32)) & 1
        return mx.where(bits.flatten(1)[:, : logits.shape[1]] == 1, logits, NEVER)

    def adjust(
        self, logits: mx.array, ids: mx.array, factor: mx.array, offset: mx.array
    ) -> mx.array:
        rows, vocab = mx.arange(len(logits))[:, None], logits.shape[1]
        padded = mx.pad(logits, [(0, 0), (0, 1)])  # one more column takes id -1
        at = mx.where(ids < 0, vocab, ids)
        old = padded[rows, at]
        padded[rows, at] = mx.where(old > 0, old / factor, old * factor) + offset
        return padded[:, :vocab]

    def sample(
        self,
        logits: mx.array,
        temperature: mx.array,
        top_k: mx.array,
        top_p: mx.array,
        min_p: mx.array,
        u: mx.array,
    ) -> mx.array:
        order, p = _ordered(logits, temperature, top_k, top_p, min_p)
        running = mx.cumsum(p, -1)
        place = (running <= u[:, None] * running[:, -1:]).sum(-1, keepdims=True)
        place = mx.minimum(place, (p > 0).sum(-1, keepdims=True) - 1)
        place = mx.where(temperature[:, None] == 0, 0, place)
        picked = mx.take_along_axis(order, place, -1)[:, 0]
        if self.ranks.size > 1:  # rank 0 decides, whatever numbers the others drew
            picked = self.ranks.all_sum(picked * (self.ranks.rank == 0))
        mx.async_eval(picked)  # so that it can be waited for alone
        return picked

    def chances(
        self,
        logits: mx.array,
        temperature: mx.array,
        top_k: mx.array,
        top_p: mx.array,
        min_p: mx.array,
    ) -> mx.array:
        order, p = _ordered(logits, temperature, top_k, top_p, min_p)
        found: mx.array = mx.put_along_axis(
            mx.zeros_like(p), order, p / p.sum(-1, keepdims=True), -1
        )
        return found

    def settle(
        self, p: mx.array, q: mx.array, guesses: mx.array, accept: mx.array, draw: mx.array
    ) -> mx.array:
        at, guessed = mx.maximum(guesses, 0)[:, None], guesses[:, None] >= 0
        mine, its = (mx.take_along_axis(x, at, -1)[:, 0] for x in (p, q))
        kept = guessed[:, 0] & (accept * its < mine)
        rest = mx.where(guessed, mx.maximum(p - q, 0), p)
        rest = mx.where(rest.max(-1, keepdims=True) > 0, rest, p)  # p is q but for rounding
        running = mx.cumsum(rest, -1)
        total = running[:, -1:]
        drawn = (running <= mx.minimum(draw[:, None] * total, total * ALMOST)).sum(-1)
        return mx.where(kept, guesses, drawn.astype(guesses.dtype))


def _ordered(
    logits: mx.array, temperature: mx.array, top_k: mx.array, top_p: mx.array, min_p: mx.array
) -> tuple[mx.array, mx.array]:
    """(R, V) tokens, the likeliest first, and what remains of their chances after the cuts."""
    order = mx.argsort(-logits, -1)
    place = mx.arange(logits.shape[-1])
    beyond = (top_k[:, None] > 0) & (place >= top_k[:, None])
    beyond |= (temperature[:, None] == 0) & (place > 0)
    ordered = mx.take_along_axis(logits, order, -1) / mx.maximum(temperature, 1e-6)[:, None]
    p = mx.softmax(mx.where(beyond, NEVER, ordered), -1)
    kept = (mx.cumsum(p, -1) - p < top_p[:, None]) & (p >= min_p[:, None] * p[:, :1])
    return order, mx.where(kept, p, 0)
