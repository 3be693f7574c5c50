"""Runs steps of a loaded model: weights, caches, and how far each slot has come."""

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

from . import model
from .backend import Array, Backend, Weights
from .cache import make_cache, slack_of
from .config import Config
from .errors import PromptError
from .parallel.follow import lead
from .step import Chunk, Step, plan, plan_decode, watched

if TYPE_CHECKING:
    from .draft.drafter import Drafter

MAX_CHUNK = 256  # where the backend has no max_chunk of its own, which suits its kernels


class Runner:
    """The model on a backend, with `slots` sequences of up to `context` tokens.

    `run` appends tokens to sequences; `rewind` moves a sequence back by up to `slack` tokens,
    or to its start.
    """

    def __init__(
        self,
        be: Backend,
        cfg: Config,
        weights: Weights,
        context: int,
        slots: int = 1,
        max_chunk: int | None = None,
        identity: Callable[[], str] | None = None,
    ) -> None:
        self.be, self.cfg, self.weights = be, cfg, weights
        self.identity = identity  # of the weights: what must be equal for caches to be shared
        self.context, self.slots = context, slots
        self.max_chunk = min(max_chunk or getattr(be, "max_chunk", MAX_CHUNK), context)
        self.slack = slack_of(be, self.max_chunk)
        self.cache = make_cache(be, cfg, slots, context, self.max_chunk)
        self.lengths = [0] * slots
        self._ratios = sorted({ratio for ratio in cfg.compress_ratios if ratio})
        self._forward = be.capture(self._on_device)
        self.drafter: Drafter | None = None
        self.led = lead(self)  # set if other processes repeat what is done here
        self._reach = [0] * slots  # one past the furthest position whose rows the rings hold

    def attach(self, drafter: "Drafter") -> None:
        """Let a drafter watch what is run from now on; before the first step."""
        self.drafter = drafter

    def run(
        self, tokens: Mapping[int, Sequence[int]], pad_to: int = 0, every_row: bool = False
    ) -> Array:
        """One step: {slot: next tokens} -> logits on the device, a row a slot or a row a token.

        With `every_row` padding has rows too, after the tokens': what they hold means nothing.
        Raises PromptError if a sequence would outgrow the context, or for an unknown token.
        """
        chunks = [Chunk(slot, self.lengths[slot], list(ids)) for slot, ids in tokens.items()]
        for chunk in chunks:
            self._check(chunk)
        if all(len(chunk.tokens) == 1 for chunk in chunks):
            pad_to = max(pad_to, len(chunks))  # decoding: shapes repeat
        return self._step(chunks, plan(chunks, self._ratios, pad_to, every_row))

    def run_ahead(self, slots: Sequence[int], tokens: Array) -> Array:
        """One token for each slot, from tokens (n,) that the host need not have seen.

        Tokens beyond len(slots) are padding. Returns logits (n, vocab), of which the first
        len(slots) rows count. Raises PromptError if a sequence would outgrow the context.
        """
        chunks = [Chunk(slot, self.lengths[slot], [0]) for slot in slots]
        for chunk in chunks:
            self._check(chunk)
        positions = [chunk.start for chunk in chunks]
        step = plan_decode(tokens, slots, positions, self._ratios, len(tokens))
        return self._step(chunks, step)

    def _step(self, chunks: list[Chunk], step: Step) -> Array:
        for slot, start, ids in chunks:  # before the rows are written: a step may be interrupted
            self._reach[slot] = max(start + len(ids), self._reach[slot] if start else 0)
        logits = self.follow(step if self.led is None else self.led.step(step))
        for slot, start, ids in chunks:
            self.lengths[slot] = start + len(ids)
        return logits

    def follow(self, step: Step) -> Array:
        """Run a step that another process has planned, or this one."""
        near = self.drafter.near if self.drafter else 0
        return self._forward(watched(step, near) if near else step)

    def _on_device(self, step: Step) -> Array:
        watch = self.drafter.watch(step) if self.drafter and self.drafter.near else None
        return model.forward(self.be, self.cfg, self.weights, self.cache, step, watch)

    def can_rewind(self, slot: int, length: int) -> bool:
        """Whether the rings still hold what a sequence cut to `length` tokens needs."""
        return length == 0 or self._reach[slot] - length <= self.slack

    def rewind(self, slot: int, length: int) -> None:
        """Cut a sequence to `length` tokens: a cursor moves, and stale rows are written over."""
        if not 0 <= length <= self.lengths[slot] or not self.can_rewind(slot, length):
            raise ValueError(f"slot {slot} cannot go from {self.lengths[slot]} back to {length}")
        self.lengths[slot] = length

    def adopt(self, slot: int, length: int) -> None:
        """A slot's rows were put back: it holds `length` tokens, and no shorter prefix of them."""
        self.lengths[slot] = length
        self._reach[slot] = length + self.slack

    def _check(self, chunk: Chunk) -> None:
        if not 0 < len(chunk.tokens) <= self.max_chunk:
            raise ValueError(f"a chunk has 1 to {self.max_chunk} tokens, not {len(chunk.tokens)}")
        end = chunk.start + len(chunk.tokens)
        if end > self.context:
            raise PromptError(f"{end} tokens do not fit the context of {self.context}")
        vocab = self.cfg.vocab_size
        unknown = next((token for token in chunk.tokens if not 0 <= token < vocab), None)
        if unknown is not None:
            raise PromptError(f"token {unknown} is not in the vocabulary of {vocab}")
