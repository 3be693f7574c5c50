"""Speculation in the engine: rounds of guesses where they pay, for all that decode."""

import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from functools import partial

import numpy as np
from numpy.typing import NDArray

from ..draft.speculate import Guide, Speculator, Turn
from .grammar import along
from .run import Run
from .scheduler import Job


class Guessing:
    """A speculator that is told of plain steps, too: it must know what guessing has to beat."""

    def __init__(self, speculator: Speculator) -> None:
        self._speculator = speculator
        self._last, self._decoded = 0.0, 0  # when a step ended, and how many it only decoded

    def pays(self, running: Iterable[Job]) -> bool:
        """Whether those that decode should guess now."""
        decoding = sum(job.decoding for job in running)
        return decoding > 0 and self._speculator.policy.length(decoding) > 0

    def stepped(self, decoded: int) -> None:
        """A step ended that decoded so many requests and did nothing else; 0: another step.

        Steps overlap, so the time of one is that from its end to the next one's.
        """
        now = time.perf_counter()
        if decoded and decoded == self._decoded:
            nothing = [0] * decoded
            self._speculator.policy.learn(nothing, nothing, 0.0, now - self._last)
        self._last, self._decoded = now, decoded

    def round(
        self, runs: Sequence[Run], counts: Counter[str]
    ) -> Iterator[tuple[Run, int, NDArray[np.float32] | None]]:
        """The next tokens of each run, at least one, all tokens before which are known."""
        rounds = self._speculator.round([self._turn(run) for run in runs])
        for run, came in zip(runs, rounds, strict=True):
            counts["drafted_tokens"] += came.guessed
            counts["accepted_tokens"] += len(came.tokens) - 1
            run.chosen += len(came.tokens)
        for run, came in zip(runs, rounds, strict=True):
            for number, token in enumerate(came.tokens):
                yield run, token, None if came.logits is None else came.logits[number]

    def _turn(self, run: Run) -> Turn:
        assert run.job.slot is not None
        guide: Guide | None = None
        if run.matcher is not None:
            vocab = self._speculator.runner.cfg.vocab_size
            guide = partial(along, run.matcher, vocab_size=vocab)
        wanted = run.request.params.logprobs is not None
        return Turn(run.job.slot, run.tokens, run.sampler, run.left, wanted, guide)
