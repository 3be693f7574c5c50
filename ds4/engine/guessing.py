"""Speculation in the engine: rounds of guesses where they pay, for all that decode."""

import logging
import time
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..draft.speculate import Guide, Speculator, Turn
from ..sampler import Sampler, SamplingParams
from .grammar import along
from .run import Run

PERIOD = 8  # tokens of a text that repeats, so that look-up has guesses, too
log = logging.getLogger(__name__)


class Guessing:
    """A speculator that is told of plain steps, too: it must know what guessing has to beat."""

    def __init__(self, speculator: Speculator) -> None:
        self._speculator = speculator
        self._asked: dict[str, tuple[Turn, int]] = {}  # how much each is to guess now
        self._last = 0.0  # when a step ended
        self._decoded: list[str] = []  # what it decoded, if it did nothing else

    def warm(self) -> None:
        """A round of each length, twice: the first compiles. Nothing is learned from these."""
        start, runner = time.perf_counter(), self._speculator.runner
        longest = self._speculator.drafter.longest
        text = [n % PERIOD for n in range(3 * PERIOD)]
        if runner.context < len(text) + longest:
            return
        speculator = Speculator(runner, self._speculator.drafter)
        runner.rewind(0, 0)
        for token in text[:-1]:
            runner.run({0: [token]})
        sampler = Sampler(SamplingParams(temperature=0.0), [], runner.cfg.vocab_size)
        for guesses in [*range(1, longest + 1)] * 2:
            turn = Turn(0, text, sampler, longest + 1, speculator.policy.record())
            speculator.round([turn], [guesses])
            runner.rewind(0, len(text) - 1)
        log.info("rounds of 1 to %d guesses: %.1f s", longest, time.perf_counter() - start)

    def pays(self, runs: Iterable[Run]) -> bool:
        """Whether those that decode should guess now."""
        able = [run for run in runs if run.job.decoding and run.wants_more]
        turns = [self._turn(run) for run in able]
        counts = self._speculator.lengths(turns)
        ids = [run.request.id for run in able]
        self._asked = dict(zip(ids, zip(turns, counts, strict=True), strict=True))
        return any(counts)

    def stepped(self, runs: Sequence[Run]) -> None:
        """A step ended that decoded these and did nothing else; none: another step.

        Steps overlap, so the time of one is that from its end to the next one's.
        """
        now, ids = time.perf_counter(), [run.request.id for run in runs]
        over = any(run.job.slot is None for run in runs)  # ended by the step before this one
        if runs and not over and ids == self._decoded:
            self._speculator.stepped([self._turn(run) for run in runs], now - self._last)
        self._last, self._decoded = now, ids

    def round(self, runs: Sequence[Run]) -> Iterator[tuple[Run, int, NDArray[np.float32] | None]]:
        """The next tokens of each run, at least one, all tokens before which are known.

        They were among those of whom `pays` was asked.
        """
        turns, asked = zip(*(self._asked[run.request.id] for run in runs), strict=True)
        rounds = self._speculator.round(turns, asked)
        for run, came in zip(runs, rounds, strict=True):
            run.chosen += len(came.tokens)
        for run, came in zip(runs, rounds, strict=True):
            for number, token in enumerate(came.tokens):
                yield run, token, None if came.logits is None else came.logits[number]

    def figures(self) -> dict[str, Any]:
        """For Stats."""
        return vars(self._speculator.tally) | {"saved_s": self._speculator.policy.saved_s}

    def _turn(self, run: Run) -> Turn:
        assert run.job.slot is not None
        guide: Guide | None = None
        if run.matcher is not None:
            vocab = self._speculator.runner.cfg.vocab_size
            guide = partial(along, run.matcher, vocab_size=vocab)
        if run.record is None:
            run.record = self._speculator.policy.record()
        return Turn(
            run.job.slot,
            run.tokens,
            run.sampler,
            run.left,
            run.record,
            run.request.params.logprobs is not None,
            guide,
        )
