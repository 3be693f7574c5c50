"""One request on its way: its tokens, its text, its limits, its clock."""

import time
from array import array
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..draft.policy import Record
from ..errors import PromptError
from ..sampler import Sampler, token_logprob
from ..tokenizer import TextStream, Tokenizer
from .api import Event, Finished, FinishReason, Progress, Request, Tokens
from .grammar import Matcher
from .scheduler import Job


@dataclass
class Clock:
    """When it was submitted, admitted, and when its first token was known."""

    submitted: float = field(default_factory=time.perf_counter)
    admitted: float = 0.0
    first: float = 0.0

    def seconds(self) -> dict[str, float]:
        now = time.perf_counter()
        admitted, first = self.admitted or now, self.first or now
        queued, prefill = admitted - self.submitted, first - admitted
        return {"queued_s": queued, "prefill_s": prefill, "decode_s": now - first}


class Run:
    """A request, what became of it so far, and the events that tell so."""

    def __init__(
        self,
        request: Request,
        prompt: "array[int]",
        sampler: Sampler,
        tokenizer: Tokenizer | None,
        budget: int,
        ends: frozenset[int],
    ) -> None:
        self.request, self.sampler = request, sampler
        self.job = Job(request.id, len(prompt), request.priority)
        self.prompt_tokens, self.cached = len(prompt), 0
        self.tokens = prompt  # of the prompt, and all that were chosen: end tokens, too
        self.text = TextStream(tokenizer, request.params.stop)
        self.matcher: Matcher | None = None
        self.compiling: Future[Matcher] | None = None
        self.record: Record | None = None  # of its guesses
        self.chosen = 0  # tokens that were asked for; the host may not know the last
        self.stops: list[int] = []  # lengths at which its slot is worth keeping
        self.over = False
        self._budget, self._ends, self._clock = budget, ends, Clock()

    @property
    def wants_more(self) -> bool:
        """Whether another token is to be chosen after those that were asked for."""
        return not self.over and self.chosen < self._budget

    @property
    def left(self) -> int:
        """How many more tokens may be asked for."""
        return self._budget - self.chosen

    @property
    def next_position(self) -> int:
        """Of the token to be chosen now."""
        return self.prompt_tokens + self.chosen

    def admitted(self) -> None:
        self._clock.admitted = time.perf_counter()

    def progress(self) -> Progress:
        return Progress(self.request.id, self.job.done, self.job.total, self.cached)

    def take(self, token: int, logits: NDArray[Any] | None) -> Iterator[Event]:
        """The next token is known; `logits` (V,) are those that it was chosen from, if wanted."""
        self._clock.first = self._clock.first or time.perf_counter()
        self.tokens.append(token)
        self.sampler.count(token)
        if token in self._ends:
            yield self.finish("stop")
            return
        top = self.request.params.logprobs
        known = None if logits is None else [token_logprob(logits, token, top or 0)]
        yield Tokens(self.request.id, [token], self.text.push(token), known)
        if self.text.stopped is not None:
            yield self.finish("stop")
        elif self.matcher is not None and not self.matcher.consume_token(token):
            yield self.finish("error", f"the grammar failed: {self.matcher.get_error()[:200]}")
        elif len(self.text.tokens) == self._budget:
            yield self.finish("length")
        elif self.matcher is not None and self.matcher.is_stopped():
            yield self.finish("stop")  # it allows nothing but the end

    def finish(self, reason: FinishReason, message: str | None = None) -> Finished:
        """The last event."""
        self.over = True
        rest = self.text.flush()
        if reason == "length" and self.text.stopped is not None:  # by what the flush has brought
            reason = "stop"
        return Finished(
            self.request.id,
            reason,
            self.prompt_tokens,
            self.cached,
            len(self.text.tokens),
            rest,
            self.text.stopped,
            **self._clock.seconds(),
            message=message,
        )


def as_tokens(ids: Sequence[int], vocab: int) -> "array[int]":
    """A prompt as 32-bit integers, which compare and copy fast. Raises PromptError."""
    if not len(ids):
        raise PromptError("the prompt is empty")
    unknown = next((token for token in ids if not 0 <= token < vocab), None)
    if unknown is not None:
        raise PromptError(f"token {unknown} is not in the vocabulary of {vocab}")
    return array("i", np.asarray(ids, np.int32).tobytes())
