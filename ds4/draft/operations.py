"""What drafters ask of a backend beside what the model asks (spec 3.12, Appendix A).

Shapes as in backend.py; `step` is what a drafter watches or drafts.
"""

from collections.abc import Sequence
from typing import Protocol

from ..backend import Array, Backend, Rows, Weight, Weights
from ..config import Config
from ..step import Step


class DraftBackend(Backend, Protocol):
    """A backend that can draft."""

    def streams(self, h: Array) -> Array:
        """(T, H, D) -> (T, H * D): the streams, to be stored."""

    def tap(self, h: Array) -> Array:
        """(T, H, D) -> (T, D): their mean."""

    def recall(self, ring: Rows, step: Step) -> Array:
        """(T, width): the float rows that `write` stored at (slot, pos % size)."""

    def join(self, w: Weights, embed: Weight, step: Step, x: Array, cfg: Config) -> Array:
        """Streams (T, H * D) and the step's tokens -> streams (T, H, D), what an MTP block reads.

        Each stream is normed with hnorm and multiplied by h_proj; to each, e_proj times the token's
        row of `embed`, normed with enorm, is added.
        """

    def fuse(self, proj: Weight, norm: Weight, parts: Sequence[Array], eps: float) -> Array:
        """(T, D) each -> (T, D): side by side, multiplied, normed."""

    def attend_block(
        self, w: Weights, ring: Rows, step: Step, q: Array, kv: Array, size: int, cfg: Config
    ) -> Array:
        """(T, N, C), (T, C) -> (T, N, C): attention of blocks of `size` tokens, for drafting.

        Rows come block after block. Each token sees its whole block, whose rows `kv` are normed,
        rotated and rounded as `remember` does but not stored, and the cfg.sliding_window rows of
        the ring before the block.
        """

    def markov(self, w: Weights, base: Array, hidden: Array, tokens: Array) -> tuple[Array, Array]:
        """(R, V), (R, D), and the tokens before (R,) -> logits (R, V), confidence logits (R,).

        A row of w.w1 for each token; times w.w2 it is added to `base`; beside `hidden` it is
        multiplied by w.confidence.
        """

    def best(self, logits: Array) -> Array:
        """(R, V) -> (R,): the token of the largest logit, of equal ones the lowest."""

    def drawn(self, logits: Array, how: Array) -> Array:
        """(R, V) -> (R,): as `sample` takes tokens, by a step's `draws` for them.

        how  float32 (5, R or more): temperature, top_k, top_p, min_p and a random number each
        """

    def joined(self, parts: Sequence[Array]) -> Array:
        """(R,) each -> one after another."""

    def coming(self, x: Array) -> Array:
        """The same, on its way to the host: a download does not wait for what is begun later."""

    def chances(
        self, logits: Array, temperature: Array, top_k: Array, top_p: Array, min_p: Array
    ) -> Array:
        """(R, V) and (R,) each -> (R, V): how likely `sample` is to take each token."""

    def settle(self, p: Array, q: Array, guesses: Array, accept: Array, draw: Array) -> Array:
        """(R, V) twice, (R,) each -> (R,) tokens that are distributed as `p`, by rejection.

        A guess, drawn from `q`, is taken if accept * q < p, with its chances in both; else, by
        `draw`, a token from what p has more than q. Guess -1 is none: its token is drawn from `p`.
        `accept` and `draw` are random numbers in [0, 1).
        """
