"""Who runs next: the queue, the slots, and what a step does. Integers only, no arrays, no clock.

A job waits in the queue, is admitted to a slot, has its prompt absorbed in chunks, and then decodes
one token a step until it is finished. A step decodes every job that can, and besides absorbs at
most `chunk` tokens of prompts: so what a long prompt adds to the time between two tokens of others
is bounded.

A chunk ends at a multiple of `chunk` or with the prompt, whatever else runs: the shapes in which a
prompt is computed do not depend on its company. Several short prompts share a step if they fit.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field

from ..errors import ConfigError
from .api import QueueFull

PATIENCE = 64  # later arrivals that may pass a waiting job before it goes first


@dataclass(frozen=True)
class Limits:
    """What a queue takes; None: no limit of its own."""

    waiting: int = 1024  # requests that have no slot yet
    waiting_tokens: int = 4_000_000  # of their prompts, in all
    prompt_tokens: int | None = None  # of one request; never more than the context
    new_tokens: int | None = None  # that one request may ask for

    def __post_init__(self) -> None:
        if self.new_tokens is not None and self.new_tokens < 1:
            raise ConfigError(f"new_tokens must be at least 1, not {self.new_tokens}")


@dataclass(eq=False)
class Job:
    """A request as the scheduler sees it."""

    id: str
    total: int  # tokens of the prompt
    priority: int = 0  # lower first
    ready: bool = True  # false: not to be admitted yet
    slot: int | None = None
    done: int = 0  # tokens of the prompt that its slot holds
    leader: "Job | None" = None  # absorbs the first `shared` tokens for it, too
    shared: int = 0
    passed: int = 0  # in the queue: later arrivals admitted before; then: tokens of others
    arrival: int = field(default=0, compare=False)

    @property
    def decoding(self) -> bool:
        return self.slot is not None and self.done == self.total

    @property
    def left(self) -> int:
        return self.total - self.done


@dataclass(frozen=True)
class Work:
    """One step: jobs that decode a token, and jobs with the prompt tokens that they absorb."""

    decode: list[Job]
    prefill: list[tuple[Job, int]]


class Scheduler:
    """Jobs over `slots` slots, with at most `chunk` prompt tokens a step."""

    def __init__(self, slots: int, chunk: int, limits: Limits | None = None) -> None:
        self.slots, self.chunk, self.limits = slots, chunk, limits or Limits()
        self.waiting: list[Job] = []  # in order of arrival
        self.running: dict[int, Job] = {}  # by slot, in order of admission
        self.idle: dict[int, None] = dict.fromkeys(range(slots))  # the longest idle first
        self.waiting_tokens = 0
        self._arrivals = 0
        self._pace = 0.0  # seconds of work a waiting prompt token
        self._turn = self._since = 0.0  # seconds between two admissions; since the last

    # the queue

    def submit(self, job: Job) -> None:
        """Queue a job. Raises QueueFull."""
        limits = self.limits
        if len(self.waiting) >= limits.waiting:
            raise QueueFull(f"{len(self.waiting)} requests are waiting", self._wait(1, 0))
        over = self.waiting_tokens + job.total - limits.waiting_tokens
        if over > 0 and self.waiting:  # a single long prompt may always wait
            wait = self._wait(0, over)
            raise QueueFull(f"prompts of {self.waiting_tokens} tokens are waiting", wait)
        self._arrivals += 1
        job.arrival = self._arrivals
        self.waiting.append(job)
        self.waiting_tokens += job.total

    def _wait(self, requests: int, tokens: int) -> float:
        """Seconds until the queue is likely to be shorter by so much."""
        return min(600.0, max(1.0, requests * self._turn, tokens * self._pace))

    def measured(self, seconds: float, absorbed: int, admitted: int) -> None:
        """What a step took: from this the time until there is room is estimated."""
        if absorbed:
            self._pace += (seconds / absorbed - self._pace) * (0.1 if self._pace else 1.0)
        self._since += seconds
        if admitted:
            each = self._since / admitted
            self._turn += (each - self._turn) * (0.1 if self._turn else 1.0)
            self._since = 0.0

    # slots

    def next(self) -> Job | None:
        """The job to admit now: there is an idle slot for it."""
        ready = [job for job in self.waiting if job.ready] if self.idle else []
        if not ready:
            return None
        if ready[0].passed >= PATIENCE:
            return ready[0]
        return min(ready, key=lambda job: (job.priority, job.arrival))

    def admit(self, job: Job, slot: int, done: int = 0) -> None:
        """Give a waiting job an idle slot, which holds the first `done` tokens of its prompt."""
        if not 0 <= done < job.total:
            raise ValueError(f"{done} of {job.total} tokens cannot be known")
        del self.idle[slot]
        self._leave_queue(job)
        for other in self.waiting:
            other.passed += other.arrival < job.arrival
        job.slot, job.done, job.passed = slot, done, 0
        self.running[slot] = job

    def remove(self, job: Job) -> None:
        """A job is finished or cancelled, in whatever state: its slot is idle again."""
        if job.slot is None:
            self._leave_queue(job)
        else:
            del self.running[job.slot]
            self.idle[job.slot] = None
            job.slot = None

    def _leave_queue(self, job: Job) -> None:
        self.waiting.remove(job)
        self.waiting_tokens -= job.total

    # a step

    def plan(self) -> Work:
        """What to do now. Jobs that absorb are to be told with `absorbed`."""
        decode = [job for job in self.running.values() if job.decoding]
        return Work(decode, list(self._chunks()))

    def _chunks(self) -> Iterator[tuple[Job, int]]:
        """Prompts with little left go first, but what others took counts against them in time."""
        jobs = [j for j in self.running.values() if not j.decoding and not _follows(j)]
        starving = PATIENCE * self.chunk
        jobs.sort(key=lambda j: (j.passed < starving, j.priority, j.left - j.passed, j.arrival))
        room = self.chunk
        for job in jobs:
            count = min(job.left, self.chunk - job.done % self.chunk)
            if count <= room:
                room -= count
                yield job, count

    def absorbed(self, work: Work) -> None:
        """The chunks of a plan have been run."""
        taken = sum(count for _, count in work.prefill)
        served = {id(job) for job, _ in work.prefill}
        for job in self.running.values():
            if not job.decoding and not _follows(job) and id(job) not in served:
                job.passed += taken
        for job, count in work.prefill:
            job.done += count


def _follows(job: Job) -> bool:
    """Whether it still waits for another job to absorb what both have."""
    return job.leader is not None
