"""An engine that computes nothing: for tests of the server.

What it answers is fixed by the prompt, or scripted with `reply`. Words of a scripted answer that
spell control tokens become those tokens, so that a script can think and call tools.
"""

import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from ds4.engine.api import Event, Finished, Progress, QueueFull, Request, Stats, Tokens
from ds4.errors import PromptError
from ds4.loader import find_model
from ds4.sampler import TokenLogprob
from ds4.tokenizer import Detokenizer, StopStrings, Tokenizer

WORDS = ("the", "sea", "was", "calm", "and", "a", "small", "boat", "went", "by", "old", "stones")

Reply = Callable[[Request], str | Sequence[int]]


def demo_tokenizer() -> Tokenizer:
    return Tokenizer.from_file(find_model("demo") / "tokenizer.json")


@dataclass
class _Sequence:
    request: Request
    answer: list[int]
    detokenizer: Detokenizer
    stops: StopStrings
    arrived: float
    started: float = 0.0
    prefilled: float = 0.0
    absorbed: int = 0
    sent: int = 0


@dataclass
class FakeEngine:
    """An EngineLike. `requests` are those it took; `cancelled` the ids that were cancelled.

    chunk   prompt tokens absorbed in a step, with one Progress each
    step_s  how long a step takes
    """

    tokenizer: Tokenizer = field(default_factory=demo_tokenizer)
    reply: Reply | None = None
    slots: int = 8
    max_waiting: int = 1000
    context: int = 4096
    chunk: int = 512
    step_s: float = 0.0
    requests: list[Request] = field(default_factory=list)
    cancelled: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._waiting: deque[_Sequence] = deque()
        self._running: dict[str, _Sequence] = {}
        self._ending: dict[str, _Sequence] = {}
        self._finished: Counter[str] = Counter()
        self._steps = self._prompt_tokens = self._generated = 0

    def submit(self, request: Request) -> None:
        if len(request.prompt) >= self.context:
            raise PromptError(f"the prompt has {len(request.prompt)} tokens of {self.context}")
        if len(self._waiting) >= self.max_waiting:
            raise QueueFull(f"{self.max_waiting} requests are waiting", 1.0)
        answer = self.reply(request) if self.reply else self._answer(request)
        if isinstance(answer, str):
            answer = self.tokenizer.encode_with_specials(answer)
        self.requests.append(request)
        text = Detokenizer(self.tokenizer), StopStrings(request.params.stop)
        self._waiting.append(_Sequence(request, list(answer), *text, time.monotonic()))

    def cancel(self, request_id: str) -> None:
        found = self._running.pop(request_id, None)
        for sequence in [] if found else self._waiting:
            if sequence.request.id == request_id:
                found = sequence
        if found is not None:
            self.cancelled.append(request_id)
            self._waiting = deque(s for s in self._waiting if s is not found)
            self._ending[request_id] = found

    def step(self) -> list[Event]:
        events = [self._finish(sequence, "cancelled") for sequence in self._ending.values()]
        self._ending.clear()
        while self._waiting and len(self._running) < self.slots:
            sequence = self._waiting.popleft()
            sequence.started = time.monotonic()
            self._running[sequence.request.id] = sequence
        if self._running:
            self._steps += 1
            time.sleep(self.step_s)
        for sequence in list(self._running.values()):
            events += self._advance(sequence)
        return events

    def has_work(self) -> bool:
        return bool(self._waiting or self._running or self._ending)

    def stats(self) -> Stats:
        return Stats(
            running=len(self._running),
            waiting=len(self._waiting),
            waiting_tokens=sum(len(s.request.prompt) for s in self._waiting),
            slots=self.slots,
            steps=self._steps,
            prompt_tokens=self._prompt_tokens,
            generated_tokens=self._generated,
            finished=dict(self._finished),
        )

    def close(self) -> None:
        self._running.clear()

    def _advance(self, s: _Sequence) -> list[Event]:
        total = len(s.request.prompt)
        if s.absorbed < total:
            s.absorbed = min(total, s.absorbed + self.chunk)
            if s.absorbed < total:
                return [Progress(s.request.id, s.absorbed, total, 0)]
            s.prefilled = time.monotonic()
            return [Progress(s.request.id, total, total, 0), *self._emit(s)]
        return self._emit(s)

    def _emit(self, s: _Sequence) -> list[Event]:
        limit = min(
            s.request.params.max_tokens or self.context, self.context - len(s.request.prompt)
        )
        if s.sent >= min(limit, len(s.answer)):
            return [self._finish(s, "length" if s.sent >= limit else "stop")]
        token = s.answer[s.sent]
        s.sent += 1
        self._generated += 1
        top = s.request.params.logprobs
        text = s.stops.push(s.detokenizer.push([token]))
        event = Tokens(s.request.id, [token], text, None if top is None else [_logprob(token, top)])
        if s.stops.found is not None:
            return [event, self._finish(s, "stop")]
        if s.sent >= limit:
            return [event, self._finish(s, "length")]
        return [event]

    def _finish(self, s: _Sequence, reason: str) -> Finished:
        self._running.pop(s.request.id, None)
        self._finished[reason] += 1
        self._prompt_tokens += s.absorbed
        now = time.monotonic()
        rest = s.stops.push(s.detokenizer.flush()) + s.stops.flush()
        return Finished(
            s.request.id,
            reason,  # type: ignore[arg-type]
            len(s.request.prompt),
            0,
            s.sent,
            text=rest,
            stop=s.stops.found,
            queued_s=(s.started or now) - s.arrived,
            prefill_s=max(0.0, s.prefilled - s.started),
            decode_s=now - s.prefilled if s.prefilled else 0.0,
        )

    def _answer(self, request: Request) -> list[int]:
        """Some words that depend on nothing but the prompt, after a thought if it asks for one."""
        seed = sum(request.prompt) + len(request.prompt)
        words = " ".join(WORDS[(seed + n * n) % len(WORDS)] for n in range(8 + seed % 8))
        thinks = request.prompt[-1] == self.tokenizer.token_id("<think>")
        return self.tokenizer.encode_with_specials(
            f"hm, {words}</think>{words}" if thinks else words
        )


def _logprob(token: int, top: int) -> TokenLogprob:
    others = ((token + n, -0.5 - n) for n in range(1, top))
    return TokenLogprob(token, -0.5, ((token, -0.5), *others) if top else ())
