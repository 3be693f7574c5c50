"""Who asks what and when: the load, as a machine of states that any driver can run."""

import random
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from .workload import Workload

Prompt = str | list[int]


class Texts(Protocol):
    """Makes prompts of a target's kind: token ids, or text."""

    def new(self, tokens: int) -> Prompt:
        """One of so many tokens, that begins like no other."""

    def join(self, prompt: Prompt, answer: Prompt, more: Prompt | None) -> Prompt:
        """A conversation so far, and what is said next."""


@dataclass
class Record:
    """One request as the client saw it. Seconds are those of the sampler's clock.

    `tokens` are (when, how many had come by then); `first` is when output first came.
    """

    id: str
    start: float
    first: float | None = None
    end: float | None = None
    tokens: list[tuple[float, int]] = field(default_factory=list)
    prompt_tokens: int = 0
    cached_tokens: int = 0
    output_tokens: int = 0
    reason: str = ""
    error: str | None = None
    exact: bool = True  # False: a server did not tell its count, its pieces were counted

    @property
    def ok(self) -> bool:
        return self.error is None and self.first is not None and self.end is not None


@dataclass
class Job:
    """A request that is to be sent now."""

    id: str
    prompt: Prompt
    output_tokens: int
    temperature: float
    seed: int
    turn: int = 0


class Load:
    """Hands out jobs when they are due and takes their outcomes.

    `full_from` and `full_until` bound the time in which the load was as heavy as was asked for.
    """

    def __init__(self, workload: Workload, texts: Texts, begin: float, seed: int) -> None:
        self.workload, self.begin = workload, begin
        self.full_from: float | None = begin if workload.concurrency == 1 else None
        self.full_until: float | None = None
        self.records: list[Record] = []
        self._texts, self._seed = texts, seed
        self._running: dict[str, tuple[Job, Record]] = {}
        self._ready: deque[tuple[Prompt, int]] = deque()
        self._count = 0
        self._begun = 0  # requests whose output has begun
        self._shared = texts.new(workload.shared_tokens) if workload.shared_tokens else None
        rng = random.Random(f"{seed} {workload.key}")
        self._gaps = lambda: rng.expovariate(workload.rate)
        self._next_arrival = begin
        if workload.kind == "poisson":
            self.full_from = begin

    # what a driver asks

    def due(self, now: float) -> list[Job]:
        """The jobs to send now."""
        jobs = []
        if self.workload.kind == "poisson":
            while self._next_arrival <= now and not self._enough(self._next_arrival):
                jobs.append(self._job(self._opening(), 0, self._next_arrival))
                self._next_arrival += self._gaps()
            if self._enough(self._next_arrival) and self.full_until is None:
                self.full_until = now
            return jobs
        while len(self._running) < self.workload.concurrency:
            if self._ready:
                jobs.append(self._job(*self._ready.popleft(), now))
            elif not self._enough(now):
                jobs.append(self._job(self._opening(), 0, now))
            else:
                break
        return jobs

    def wait(self, now: float) -> float | None:
        """Seconds until a job is due that does not wait for another; None if there is none."""
        if self.workload.kind != "poisson" or self._enough(self._next_arrival):
            return None
        return max(0.0, self._next_arrival - now)

    @property
    def over(self) -> bool:
        return not self._running and self.full_until is not None

    def _enough(self, now: float) -> bool:
        spent = now - self.begin
        w = self.workload
        return spent >= w.most_seconds or (self._count >= w.requests and spent >= w.seconds)

    def _opening(self) -> Prompt:
        own = self._texts.new(self.workload.prompt_tokens)
        return own if self._shared is None else self._texts.join(self._shared, own, None)

    def _job(self, prompt: Prompt, turn: int, now: float) -> Job:
        self._count += 1
        w = self.workload
        job = Job(
            f"{w.name}-{self._count}",
            prompt,
            w.output_tokens,
            w.temperature,
            self._seed * 1_000_003 + self._count,
            turn,
        )
        record = Record(job.id, now)
        self._running[job.id] = job, record
        self.records.append(record)
        return job

    # what a driver tells

    def arrived(self, job_id: str, now: float, tokens: int) -> None:
        """`tokens` more of the output came."""
        record = self._running[job_id][1]
        if record.first is None:
            record.first = now
            self._begun += 1
            if self.full_from is None and self._begun >= self.workload.concurrency:
                self.full_from = now
        record.output_tokens += tokens
        record.tokens.append((now, record.output_tokens))

    def finished(
        self,
        job_id: str,
        now: float,
        answer: Prompt,
        reason: str,
        error: str | None = None,
        counts: Sequence[int | None] = (None, None, None),
    ) -> Record:
        """It is over; `counts` are prompt, cached and output tokens as the engine says."""
        job, record = self._running.pop(job_id)
        record.end, record.reason, record.error = now, reason, error
        prompt, cached, output = counts
        record.prompt_tokens, record.cached_tokens = prompt or 0, cached or 0
        record.exact = output is not None
        if output is not None:
            _rescale(record, output)
        w = self.workload
        if w.kind == "agent" and error is None and job.turn + 1 < w.turns:
            following = self._texts.join(job.prompt, answer, self._texts.new(w.prompt_tokens))
            self._ready.append((following, job.turn + 1))
            if self.full_until is None and now - self.begin >= w.most_seconds:
                self._ready.clear()
        if w.kind != "poisson" and not self._ready and self._enough(now):
            self.full_until = self.full_until or now
        return record


def _rescale(record: Record, output: int) -> None:
    """Let the pieces add up to the tokens that the server counted."""
    seen, record.output_tokens = record.output_tokens, output
    if seen and seen != output:
        record.tokens = [(when, round(n * output / seen)) for when, n in record.tokens]
