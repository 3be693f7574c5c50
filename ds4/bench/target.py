"""What is measured: an engine in this process, by token ids and without a server between."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

from ..engine.api import EngineLike, Event, Finished, Request, Tokens
from ..errors import BenchError, Ds4Error
from ..power.sampler import now
from ..sampler import SamplingParams
from .load import Job, Load, Texts

_FAILURES = 3  # requests in a row from the first on, after which there is nothing to measure
_NEVER = -1e4  # added to a logit


class Target(Protocol):
    """Runs loads. `about` names the model and the recipe, and says how they were reached."""

    @property
    def about(self) -> dict[str, Any]: ...

    @property
    def context(self) -> int | None:
        """Tokens that a request may have; None if it is not known."""

    def texts(self, seed: int) -> Texts: ...

    def run(self, load: Load) -> None:
        """Until it is over. Raises BenchError if nothing can be measured."""

    def usage(self) -> dict[str, Any]:
        """Memory and counters until now, as far as they are known."""

    def close(self) -> None: ...


@dataclass
class EngineTarget:
    """An engine, stepped by the thread that measures: a token's time is the end of its step.

    eos  the token that must not end an output early; None for weights that are random anyway
    """

    engine: EngineLike
    make_texts: Callable[[int], Texts]
    about: dict[str, Any]
    context: int | None
    eos: int | None = None
    memory: Callable[[], dict[str, int]] = dict
    clock: Callable[[], float] = now
    sleep: Callable[[float], None] = time.sleep
    _answers: dict[str, list[int]] = field(default_factory=dict)

    def texts(self, seed: int) -> Texts:
        return self.make_texts(seed)

    def run(self, load: Load) -> None:
        while not load.over:
            for job in load.due(self.clock()):
                self._submit(load, job)
            if self.engine.has_work():
                events = self.engine.step()
                when = self.clock()
                for event in events:
                    self._told(load, event, when)
            elif (wait := load.wait(self.clock())) is not None:
                self.sleep(min(wait, 0.05))

    def _submit(self, load: Load, job: Job) -> None:
        assert not isinstance(job.prompt, str)
        bias = {} if self.eos is None else {self.eos: _NEVER}
        params = SamplingParams(
            max_tokens=job.output_tokens,
            temperature=job.temperature,
            seed=job.seed,
            logit_bias=bias,
        )
        try:
            self.engine.submit(Request(job.id, job.prompt, params))
            self._answers[job.id] = []
        except Ds4Error as error:
            load.finished(job.id, self.clock(), [], "error", str(error))
            check(load)

    def _told(self, load: Load, event: Event, when: float) -> None:
        if isinstance(event, Tokens) and event.tokens:
            self._answers[event.id] += event.tokens
            load.arrived(event.id, when, len(event.tokens))
        elif isinstance(event, Finished):
            failed = event.reason in ("error", "cancelled")
            load.finished(
                event.id,
                when,
                self._answers.pop(event.id),
                event.reason,
                (event.message or event.reason) if failed else None,
                (event.prompt_tokens, event.cached_tokens, event.completion_tokens),
            )
            check(load)

    def usage(self) -> dict[str, Any]:
        stats = self.engine.stats()
        return {
            "memory": self.memory(),
            "prompt_tokens": stats.prompt_tokens,
            "cached_tokens": stats.cached_tokens,
            "drafted_tokens": stats.drafted_tokens,
            "accepted_tokens": stats.accepted_tokens,
            "drafts": stats.drafts,
            "accepted_at": list(stats.accepted_at),
            "guessing_saved_s": round(stats.saved_s, 3),
        }

    def close(self) -> None:
        self.engine.close()


def check(load: Load) -> None:
    """Raise BenchError if all has failed so far."""
    ended = [record for record in load.records if record.end is not None]
    if len(ended) >= _FAILURES and all(record.error for record in ended[:_FAILURES]):
        raise BenchError(f"{load.workload.name}: {ended[0].error}")
