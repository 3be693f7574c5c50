"""The loop: a step decodes a token of every running request and absorbs a piece of a prompt.

Order within a step, where the device computes while the host goes on:

1. the forward pass of the next tokens begins, from tokens that are still on the device;
2. the host reads those tokens, chosen in the step before: text, stop strings, ends, events;
3. it prepares penalties and grammar masks for the pass of 1, and the choice from it begins;
4. a chunk of prompts begins, and of prompts now complete the choice of the first token.

So the device has work while the host thinks, and a request that ended in 2 has cost one row of 1.
Elsewhere 2 comes before 1. Decoding and prefill are passes of their own: recorded decode steps
keep their few shapes, and what a request computes does not depend on its company.
"""

import concurrent.futures
import logging
import time
from collections import Counter
from collections.abc import Iterable
from typing import Any

from ..errors import Ds4Error, PromptError
from ..llm import LLM
from ..runner import Runner
from ..sampler import Sampler
from ..tokenizer import Tokenizer
from .api import Event, Finished, Request, Stats, Tokens
from .grammar import Grammars
from .guessing import Guessing
from .passes import Passes, Picked
from .reuse import Prefixes, Slots
from .run import Run, as_tokens
from .scheduler import Limits, Scheduler

log = logging.getLogger(__name__)


class Engine:
    """Many requests at once on one model. It owns the model: nothing else may run it meanwhile.

    model     what ds4.load(..., slots=N) returns, or a Runner and its tokenizer
    limits    of the queue and of single requests
    chunk     prompt tokens a step; None: what the backend takes best at once. A smaller one lets
              others' tokens come sooner while a prompt is absorbed, and the prompt later
    prefixes  snapshots of prompts and turns, beyond what the slots still hold
    """

    def __init__(
        self,
        model: LLM | Runner,
        tokenizer: Tokenizer | None = None,
        limits: Limits | None = None,
        chunk: int | None = None,
        prefixes: Prefixes | None = None,
    ) -> None:
        runner = model.runner if isinstance(model, LLM) else model
        self.runner = runner
        self.tokenizer = model.tokenizer if isinstance(model, LLM) else tokenizer
        self.limits = limits or Limits()
        self.prefixes = prefixes
        chunk = min(chunk or runner.max_chunk, runner.max_chunk)
        self._scheduler = Scheduler(runner.slots, chunk, self.limits)
        self._slots = Slots(runner, prefixes)
        self._passes = Passes(runner)
        self._ahead: bool = getattr(runner.be, "looks_ahead", False)
        speculator = model.speculator if isinstance(model, LLM) else None
        self._guessing = Guessing(speculator) if speculator else None
        vocab, self._end = runner.cfg.vocab_size, runner.cfg.eos_token_id
        self._grammars = Grammars(self.tokenizer, vocab, self._end)
        self._runs: dict[str, Run] = {}  # every request that is not over
        self._picked: list[Picked] = []  # the tokens that the host does not know yet
        self._cancelled: list[str] = []
        self._events: list[Event] = []
        self._counts: Counter[str] = Counter()
        self._reasons: Counter[str] = Counter()
        self._failed = False  # the last step
        for slot in range(runner.slots):
            self._slots.clear(slot)

    def warm(self, users: int = 1) -> None:
        """Compile what the first requests need, and `users` at once; the log says what it costs.

        Other sizes of steps compile when they first come: seconds each, once a machine.
        """
        self._passes.warm(users, self._scheduler.chunk)
        if self._guessing:
            self._guessing.warm()
        for slot in range(self.runner.slots):
            self._slots.clear(slot)

    # what EngineLike asks for

    def submit(self, request: Request) -> None:
        """Queue a request. Raises PromptError if it can never run, QueueFull if not now."""
        run = self._accept(request)
        run.job.ready = request.grammar is None
        self._scheduler.submit(run.job)
        try:
            run.compiling = self._grammars.compile(request.grammar) if request.grammar else None
        except BaseException:  # no thread for it
            self._scheduler.remove(run.job)
            raise
        self._runs[request.id] = run

    def cancel(self, request_id: str) -> None:
        """End a request in any state; its Finished comes with the next step. Unknown: no effect."""
        if request_id in self._runs:
            self._cancelled.append(request_id)

    def has_work(self) -> bool:
        """Whether a step would do anything."""
        return bool(self._runs or self._events)

    def step(self) -> list[Event]:
        """Run one step and tell what it brought; without work, an empty list at once."""
        start = time.perf_counter()
        for cancelled in self._cancelled:
            if run := self._runs.get(cancelled):
                self._over(run, run.finish("cancelled"))
        self._cancelled.clear()
        self._compiled()
        self._follow()
        admitted = self._admit()
        absorbed = 0
        if self._scheduler.running:
            try:
                absorbed = self._advance()
                self._failed = False
            except Exception as error:
                self._fail(error)
        elif waits := [run.compiling for run in self._runs.values() if run.compiling]:
            concurrent.futures.wait(waits, 0.01, concurrent.futures.FIRST_COMPLETED)
        self._scheduler.measured(time.perf_counter() - start, absorbed, admitted)
        events, self._events = self._events, []
        return events

    def stats(self) -> Stats:
        """Counts now and since the start."""
        prefixes = self.prefixes
        guesses = self._guessing.figures() if self._guessing else {}
        return Stats(
            running=len(self._scheduler.running),
            waiting=len(self._scheduler.waiting),
            waiting_tokens=self._scheduler.waiting_tokens,
            slots=self.runner.slots,
            finished=dict(self._reasons),
            prefix_bytes=0 if prefixes is None else prefixes.bytes,
            prefix_disk_bytes=0 if prefixes is None else prefixes.disk_bytes,
            **self._counts | guesses,
        )

    def close(self) -> None:
        """Write what is still to be written. Requests in flight are dropped."""
        self._grammars.close()
        if self.prefixes is not None:
            self.prefixes.close()

    # requests come

    def _accept(self, request: Request) -> Run:
        cfg, context, params = self.runner.cfg, self.runner.context, request.params
        if request.id in self._runs:
            raise PromptError(f"request {request.id!r} is running already: ids must differ")
        prompt = as_tokens(request.prompt, cfg.vocab_size)
        most = min(context - 1, self.limits.prompt_tokens or context)
        if len(prompt) > most:
            raise PromptError(
                f"the prompt has {len(prompt)} tokens, of {most} allowed (context {context}): "
                "shorten it, or serve with a longer context"
            )
        limits = params.max_tokens, self.limits.new_tokens, context - len(prompt)
        budget = min(limit for limit in limits if limit is not None)
        sampler = Sampler(params, prompt, cfg.vocab_size)
        ends = frozenset([self._end, *params.stop_ids])
        return Run(request, prompt, sampler, self.tokenizer, budget, ends)

    def _compiled(self) -> None:
        """Requests whose grammar is compiled by now may be admitted."""
        for run in [run for run in self._runs.values() if run.compiling]:
            assert run.compiling is not None
            if run.compiling.done():
                try:
                    run.matcher, run.compiling = run.compiling.result(), None
                    run.job.ready = True
                except Exception as error:
                    self._over(run, run.finish("error", _line(error)))

    def _admit(self) -> int:
        """Give idle slots to those who wait; how many were."""
        count = 0
        while job := self._scheduler.next():
            run = self._runs[job.id]
            source = self._slots.source(run.tokens, self._scheduler.idle)
            others = list(self._scheduler.running.values())
            self._scheduler.admit(job, source.slot, self._slots.begin(source, run.tokens))
            job.leader = self._slots.leader(job, run.tokens, others)
            run.admitted()
            if job.leader is None:
                self._begins(run)
            self._counts["prompt_tokens"] += job.total
            count += 1
        return count

    def _follow(self) -> None:
        """Jobs whose leader has absorbed what they share, or is gone, go on from there."""
        for job in self._scheduler.running.values():
            leader = job.leader
            if leader is None or (leader.slot is not None and leader.done < job.shared):
                continue
            run, slot = self._runs[job.id], job.slot
            assert slot is not None
            source = self._slots.source(run.tokens, [slot])
            job.leader, job.done = None, self._slots.begin(source, run.tokens)
            self._begins(run)

    def _begins(self, run: Run) -> None:
        """Its slot holds what was known of its prompt; the rest is to be absorbed."""
        run.cached = run.job.done
        self._counts["cached_tokens"] += run.cached
        if self.prefixes is not None:
            run.stops = self.prefixes.stops(run.tokens, run.cached)

    # a step

    def _advance(self) -> int:
        """Steps 1 to 4 above; how many prompt tokens were absorbed."""
        known, self._picked = self._picked, []
        guessing = self._guessing
        guess = guessing is not None and guessing.pays(self._runs.values())
        if guess or not self._ahead:
            self._take(known)
        work = self._scheduler.plan()
        self._counts["steps"] += 1
        more = [run for job in work.decode if (run := self._runs[job.id]).wants_more]
        logits = self._passes.decode(known, more) if more and not guess else None
        if guessing is not None and guess and more:
            self._hear(guessing.round(more))
        elif self._ahead and not guess:
            self._take(known)
        if logits is not None:
            self._picked.append(self._passes.choose(logits, more))
        chunks = [(self._runs[job.id], count) for job, count in work.prefill]
        mark = self._ahead and not self._picked
        self._picked += self._passes.prefill(chunks, mark)
        self._scheduler.absorbed(work)
        for run, _ in chunks:
            self._events.append(run.progress())
            self._keep(run)
        if guessing is not None:
            guessing.stepped([] if guess or chunks else more)
        return sum(count for _, count in chunks)

    def _take(self, known: list[Picked]) -> None:
        """Read the tokens of the last step and tell what became of them."""
        for picked in known:
            self._hear(picked.read(self.runner.be))

    def _hear(self, tokens: Iterable[tuple[Run, int, Any]]) -> None:
        """Tokens of requests are known, and the logits of those that want them."""
        for run, token, logits in tokens:
            for event in () if run.over else run.take(token, logits):
                if isinstance(event, Finished):
                    self._over(run, event)
                else:
                    self._events.append(event)
                self._counts["generated_tokens"] += isinstance(event, Tokens)

    def _over(self, run: Run, event: Finished) -> None:
        """A request has its last event, and its slot is free."""
        self._events.append(event)
        self._reasons[event.reason] += 1
        del self._runs[run.request.id]
        slot = run.job.slot
        self._scheduler.remove(run.job)
        if slot is not None:
            self._slots.settle(slot)
            self._slots.keep(slot, self._slots.length(slot))

    def _keep(self, run: Run) -> None:
        """A prompt is remembered on the way: others may share its beginning only."""
        while run.stops and run.stops[0] <= run.job.done and run.job.slot is not None:
            self._slots.keep(run.job.slot, run.stops.pop(0))

    def _fail(self, error: Exception) -> None:
        """A step failed: its requests are lost. Raises the error if it is the second in a row."""
        log.exception("a step failed")
        for job in list(self._scheduler.running.values()):
            slot, run = job.slot, self._runs[job.id]
            assert slot is not None
            self._slots.clear(slot)
            self._over(run, run.finish("error", _line(error)))
        self._picked = []
        if self._failed:
            raise error
        self._failed = True


def _line(error: Exception) -> str:
    """One line for the user; what is not meant for users is in the log."""
    return str(error) if isinstance(error, Ds4Error) else f"internal error: {type(error).__name__}"
