"""How likely a model finds a continuation: what multiple-choice tasks ask many times."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from ..errors import PromptError
from ..llm import LLM
from ..runner import Runner
from .score import log_softmax


class Likelihood(NamedTuple):
    """Of all tokens of a continuation."""

    log_probability: float
    greedy: bool  # whether each is the likeliest where it stands


class Scorer:
    """Keeps what it read last: a context that several continuations share is read once."""

    def __init__(self, llm: LLM) -> None:
        self.runner = Runner(llm.runner.be, llm.config, llm.runner.weights, llm.context)
        self._held: list[int] = []

    def score(self, context: Sequence[int], continuation: Sequence[int]) -> Likelihood:
        """Of `continuation` after `context`, whose first tokens are dropped if it is too long.

        Raises PromptError for an empty context or a continuation that fills the model's.
        """
        if not context:
            raise PromptError("a continuation needs something before it: begin with a begin token")
        room = self.runner.context + 1 - len(continuation)
        if room < 1:
            raise PromptError(
                f"a continuation of {len(continuation)} tokens does not fit the context of "
                f"{self.runner.context}: load the model with a longer one"
            )
        context = list(context[-room:])
        ids = [*context, *continuation]
        self._read(context[:-1])
        total, greedy = 0.0, True
        for start in range(len(context) - 1, len(ids) - 1, self.runner.max_chunk):
            chunk = ids[start : min(start + self.runner.max_chunk, len(ids) - 1)]
            logits = self.runner.be.download(self.runner.run({0: chunk}, every_row=True))
            self._held += chunk
            wanted = np.array(ids[start + 1 : start + 1 + len(chunk)])
            found = log_softmax(logits)[np.arange(len(chunk)), wanted]
            total += float(found.sum(dtype=np.float64))
            greedy &= bool((logits.argmax(-1) == wanted).all())
        return Likelihood(total, greedy)

    def _read(self, ids: list[int]) -> None:
        """Bring the cache to exactly these tokens."""
        alike = 0
        for held, wanted in zip(self._held, ids, strict=False):
            if held != wanted:
                break
            alike += 1
        if not self.runner.can_rewind(0, alike):
            alike = 0
        self.runner.rewind(0, alike)
        self._held = ids[:alike]
        for start in range(alike, len(ids), self.runner.max_chunk):
            chunk = ids[start : start + self.runner.max_chunk]
            self.runner.be.download(self.runner.run({0: chunk}))
            self._held += chunk
