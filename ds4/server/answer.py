"""Requests under way: the engine's events become a dialect's, or one whole answer."""

import asyncio
import time
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any

import msgspec

from .. import __version__
from ..engine.api import Finished, Progress, Request, Tokens
from .client import EventStream
from .dialect import sse
from .errors import ApiError, told
from .merge import merged
from .output import OutputParser
from .prepare import Prepared
from .served import Served

FINGERPRINT = f"ds4-{__version__}"


class Answer:
    """One of a request's answers. `whole` is complete when its events have ended."""

    def __init__(
        self, served: Served, prepared: Prepared, parser: OutputParser, stream: EventStream
    ) -> None:
        self._served, self._prepared = served, prepared
        self._parser, self._stream = parser, stream
        self._clock = Clock()
        self._started = False
        self._accumulated = prepared.dialect.response(
            prepared.run.id, prepared.run.model, prepared.run.created, len(prepared.ids), 0
        )

    async def __aiter__(self) -> AsyncIterator[Progress | dict[str, Any]]:
        """Progress, and the dialect's events. Raises Ds4Error when the engine fails."""
        finished: Finished | None = None
        async for event in self._stream:
            self._clock.saw(event)
            if isinstance(event, Progress):
                yield event
            for each in self._start(event):
                yield each
            if isinstance(event, Tokens):
                for each in self._told(self._parser.push(event.tokens, event.logprobs)):
                    yield each
                if self._parser.finished:
                    finished = await self._end()
                    break
            elif isinstance(event, Finished):
                finished = event
        await self._stream.aclose()
        if finished is not None and finished.reason in ("error", "cancelled"):
            raise _failed(finished)
        cut = finished is not None and finished.reason == "length" and not self._parser.finished
        self._prepared.run.timings = self._timings(finished)
        for each in self._told(self._parser.finish(cut)):
            yield each
        if self._parser.called:
            self._remember()

    def whole(self) -> dict[str, Any]:
        done: dict[str, Any] = msgspec.json.decode(self._accumulated.to_json())
        return done

    async def aclose(self) -> None:
        await self._stream.aclose()

    async def _end(self) -> Finished | None:
        """The engine's last word on an answer that is complete: it seldom has more to say.

        After a call only the end token is to come; a stop string the engine may have seen, too.
        """
        for _ in range(2 if self._parser.called else 1):
            event = await anext(self._stream, None)
            if isinstance(event, Finished):
                return event
        return None

    def _start(self, event: Any) -> list[dict[str, Any]]:
        if self._started:
            return []
        self._started = True
        cached = getattr(event, "cached", 0)
        return self._told(self._parser.start(len(self._prepared.ids), cached, FINGERPRINT))

    def _told(self, events: list[Any]) -> list[dict[str, Any]]:
        told = [msgspec.json.decode(event.to_json()) for event in events]
        for event in events:
            self._accumulated.accumulate(event)
        return told

    def _timings(self, finished: Finished | None) -> dict[str, Any]:
        found = self._clock.timings(len(self._prepared.ids), len(self._parser.ids), finished)
        more = self._served.settings.timings
        return {**found, **(more(finished) if more and finished else {})}

    def _remember(self) -> None:
        said = self._prepared.dialect.said(self.whole())
        if said["calls"]:
            model = self._prepared.served
            turn = model.encoder.turn(self._parser.ids, self._prepared.thinks, **said)
            if turn is not None:
                model.replays.remember(turn)


class Clock:
    """When what happened, as seen from here; the engine's own times count where it told them."""

    def __init__(self) -> None:
        self._start = time.perf_counter()
        self._begun = self._first = 0.0
        self._cached = 0

    def saw(self, event: Any) -> None:
        now = time.perf_counter()
        self._begun = self._begun or now
        if isinstance(event, Progress):
            self._cached = event.cached
        if isinstance(event, Tokens):
            self._first = self._first or now

    def timings(self, prompt: int, written: int, finished: Finished | None) -> dict[str, Any]:
        now = time.perf_counter()
        first = self._first or now
        queued, prefill, decode = self._begun - self._start, first - self._begun, now - first
        if finished is not None:
            self._cached = finished.cached_tokens
            queued, prefill, decode = finished.queued_s, finished.prefill_s, finished.decode_s
        fresh = prompt - self._cached
        return {
            "queued_ms": round(queued * 1e3, 3),
            "cache_n": self._cached,
            "prompt_n": fresh,
            "prompt_ms": round(prefill * 1e3, 3),
            "prompt_per_second": _rate(fresh, prefill),
            "ttft_ms": round((first - self._start) * 1e3, 3),
            "predicted_n": written,
            "predicted_ms": round(decode * 1e3, 3),
            "predicted_per_second": _rate(max(written - 1, 0), decode),
        }


def _rate(count: int, seconds: float) -> float:
    return round(count / seconds, 3) if seconds > 0 else 0.0


class Answers:
    """All answers of one request, submitted; `aclose` cancels what has not finished."""

    def __init__(self, served: Served, prepared: Prepared, answers: list[Answer]) -> None:
        self._served, self._prepared, self._answers = served, prepared, answers

    @classmethod
    async def submit(cls, served: Served, prepared: Prepared) -> "Answers":
        """Raises Ds4Error if the engine does not take them all."""
        answers: list[Answer] = []
        try:
            for n in range(prepared.run.wishes.n):
                parser = prepared.parser()
                stream = await prepared.served.client.submit(_request(prepared, n))
                answers.append(Answer(served, prepared, parser, stream))
        except BaseException:
            for answer in answers:
                await answer.aclose()
            raise
        return cls(served, prepared, answers)

    async def aclose(self) -> None:
        for answer in self._answers:
            await answer.aclose()

    async def whole(self) -> dict[str, Any]:
        """The object for a client that does not stream. Raises Ds4Error."""

        async def run(answer: Answer) -> dict[str, Any]:
            async for _ in answer:
                pass
            return answer.whole()

        found = await asyncio.gather(*map(run, self._answers))
        whole = self._prepared.dialect.whole(list(found), self._prepared.run)
        self._store(whole)
        return whole

    async def stream(self) -> AsyncIterator[bytes]:
        """Server-sent events for a client that does."""
        dialect, run = self._prepared.dialect, self._prepared.run
        try:
            settings = self._served.settings
            async for n, item in merged(self._answers, settings, dialect.alive()):
                yield item if isinstance(item, bytes) else self._event(n, item)
        except Exception as error:
            yield dialect.failure(told(error, run.id), run)
            return
        usages = [a.whole()["usage"] for a in self._answers if run.wishes.include_usage]
        tail = b"".join(sse(None, event) for event in dialect.last_events(run, usages))
        yield tail + dialect.done()
        self._store(run.last)

    def _event(self, index: int, event: dict[str, Any]) -> bytes:
        dialect, run = self._prepared.dialect, self._prepared.run
        event = dialect.event(event, index, run)
        run.events += 1
        return sse(dialect.event_name(event), event)

    def _store(self, whole: dict[str, Any]) -> None:
        wishes = self._prepared.run.wishes
        if wishes.store and wishes.items is not None and whole.get("id"):
            self._served.responses.put(whole, wishes.items)


def _request(prepared: Prepared, n: int) -> Request:
    params = prepared.params
    if n and params.seed is not None:
        params = replace(params, seed=(params.seed + n) % (1 << 63))
    name = f"{prepared.run.id}-{n}" if n else prepared.run.id
    return Request(name, prepared.ids, params, grammar=prepared.grammar)


def _failed(finished: Finished) -> ApiError:
    if finished.reason == "cancelled":
        return ApiError(503, "the server ended this request", code="cancelled", retry_after=5)
    return ApiError(500, finished.message or "the engine failed", code="engine_error")
