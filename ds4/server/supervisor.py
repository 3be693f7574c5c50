"""An EngineClient over a process that may die: requests wait, are replayed, or end with an error.

A request is held here until an engine runs, then handed over. When the engine dies, what had sent a
token ends with EngineLost; all else goes to the next engine in the same order.
"""

import asyncio
import contextlib
import logging
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from ..engine.api import Event, Finished, QueueFull, Request, Stats, Tokens
from ..errors import Ds4Error, PromptError
from . import wire
from .client import EngineLost, ModelInfo
from .process import COMMAND, EngineProcess
from .stream import UNREAD, RequestStream

log = logging.getLogger("ds4.server")

State = Literal["stopped", "loading", "ready", "waiting"]
TRIES = 3  # engines that a request may outlive: it may be what kills them
BACKOFF_S, LONGEST_S = 0.25, 30.0
HEALTHY_S = 5.0  # an engine that worked so long was no failure to start


@dataclass(frozen=True)
class QueueLimits:
    """How much may wait: requests that have not begun, and the tokens of their prompts."""

    requests: int = 256
    tokens: int = 4_000_000


class Supervisor:
    """Keeps one model's engine running while `start`ed. An EngineClient.

    Requests are taken in every state, up to `limits`. `error` is why the model cannot be loaded.
    """

    def __init__(
        self,
        spec: wire.EngineSpec,
        model: ModelInfo,
        context: int,
        limits: QueueLimits | None = None,
        command: Sequence[str] = COMMAND,
        hang_s: float = 120.0,
    ) -> None:
        self.spec, self.model, self.context = spec, model, context
        self.limits = limits or QueueLimits()
        self.state: State = "stopped"
        self.loading = (0, 0)  # bytes of weights: done, all
        self.about: wire.Ready | None = None
        self.error: str | None = None
        self.restarts = self.refusals = 0
        self._command, self._hang_s = command, hang_s
        self._process: EngineProcess | None = None
        self._task: asyncio.Task[None] | None = None
        self._streams: dict[str, RequestStream] = {}
        self._held: dict[str, RequestStream] = {}  # not handed over, in order
        self._holding = False
        self._ends: deque[float] = deque(maxlen=64)  # when requests ended
        self._changed = asyncio.Event()
        self._ready_since = 0.0

    @property
    def ready(self) -> bool:
        return self.state == "ready"

    @property
    def pid(self) -> int | None:
        return self._process.pid if self._process else None

    @property
    def in_engine(self) -> int:
        """Requests that were handed over and have not ended."""
        return len(self._streams) - len(self._held)

    @property
    def held(self) -> int:
        """Requests that wait here."""
        return len(self._held)

    # what an EngineClient does

    async def submit(self, request: Request) -> RequestStream:
        """Queue a request. Raises PromptError, or QueueFull with the time until there is room."""
        if len(request.prompt) >= self.context:
            raise PromptError(
                f"the prompt has {len(request.prompt)} tokens, and the context of {self.context} "
                "must hold it and an answer: shorten it"
            )
        if request.id in self._streams:
            raise PromptError(f"a request {request.id!r} is running already")
        if full := self.full(len(request.prompt)):
            raise full
        stream = RequestStream(request, self._cancel)
        self._streams[request.id] = self._held[request.id] = stream
        self._hand_over()
        return stream

    async def stats(self) -> Stats:
        return self.figures()

    def figures(self) -> Stats:
        """The engine's own figures as of its last pong, and what waits here added to them."""
        told = self._process.stats if self._process else Stats()
        tokens = sum(len(stream.request.prompt) for stream in self._held.values())
        return replace(
            told,
            waiting=told.waiting + len(self._held),
            waiting_tokens=told.waiting_tokens + tokens,
        )

    # starting and stopping

    def start(self) -> None:
        """Bring the engine up, and up again whenever it ends."""
        if self._task is None:
            self.error = None
            self._task = asyncio.create_task(self._keep_up())

    async def stop(self) -> None:
        """End the engine in good order. What has sent a token is lost; all else is kept."""
        if self._task is None:
            return
        task, self._task = self._task, None
        if self.ready and self._process is not None:
            self._process.close()
        else:
            self.kill()
            task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task
        self._process = None
        self._set("stopped")
        self._lose("the engine was stopped")

    def kill(self) -> None:
        """End the engine's process at once; it comes up again if it should."""
        if self._process is not None:
            self._process.kill()

    def hold(self, holding: bool) -> None:
        """While holding, new requests wait here."""
        self._holding = holding
        self._hand_over()

    async def until_idle(self) -> None:
        """Wait until the engine has no request."""
        while self.in_engine:
            self._changed.clear()
            await self._changed.wait()

    async def until_ready(self) -> None:
        """Wait until the engine runs. Raises Ds4Error if the model cannot be loaded."""
        while not self.ready:
            if self.error:
                raise Ds4Error(self.error)
            self._changed.clear()
            await self._changed.wait()

    def end_all(self, reason: str) -> None:
        """End every request with an error."""
        for stream in list(self._streams.values()):
            self._cancel(stream)
            stream.end(EngineLost(reason))

    # inside

    def full(self, tokens: int = 0) -> QueueFull | None:
        """Why a prompt of so many tokens cannot be queued now, if it cannot."""
        waiting = [s for s in self._streams.values() if not s.begun]
        lying = sum(len(s.request.prompt) for s in waiting)
        if len(waiting) < self.limits.requests and (
            not waiting or lying + tokens <= self.limits.tokens
        ):
            return None
        self.refusals += 1
        return QueueFull(
            f"{len(waiting)} requests with {lying} tokens are waiting: try again later",
            self._retry_after(),
        )

    def _retry_after(self) -> float:
        """Seconds until a few more have ended, as fast as the last ones did."""
        if len(self._ends) < 2:
            return 5.0
        each = (time.monotonic() - self._ends[0]) / len(self._ends)
        return min(60.0, max(1.0, 4 * each))

    async def _keep_up(self) -> None:
        pause, failures = BACKOFF_S, 0
        while self._task is not None:
            self._set("loading")
            self.loading, self.about = (0, 0), None
            self._process = EngineProcess(self.spec, self._hear, self._command, self._hang_s)
            self._ready_since = float("inf")
            try:
                why = await self._process.run()
            except Exception as error:  # the system's, or a bug: nobody is to wait for ever
                log.exception("an engine could not be run")
                why = f"it cannot be run: {error}"
            self._process = None
            if time.monotonic() - self._ready_since > HEALTHY_S:
                pause = BACKOFF_S
            failures = 0 if self.about else failures + 1
            if failures == TRIES:
                self.error = f"{TRIES} engines ended while they loaded it: {why}"
            if self._task is None:  # it was to end
                return
            self.restarts += 1
            if self.error is None:  # else that was said
                log.error("the engine ended (%s); it starts again in %.2f s", why, pause)
            self._set("waiting")
            self._lose(f"the engine ended: {why}")
            await asyncio.sleep(pause)
            pause = min(LONGEST_S, pause * 2)

    def _lose(self, reason: str) -> None:
        """The engine has gone: end what had sent a token, and keep the rest for the next one."""
        suspects = [s for s in self._streams.values() if s.begun]
        unborn = [
            s for s in self._streams.values() if not s.begun and s.request.id not in self._held
        ]
        for stream in suspects + unborn[: self.about.slots if self.about else 1]:
            stream.tries += 1  # it ran, or may have: what kills an engine must not do so for ever
        for stream in list(self._streams.values()):
            stream.begun = False
            if stream.ended or stream.sent or stream.tries >= TRIES:
                self._forget(stream)
                stream.end(EngineLost(reason))
        self._held = dict(self._streams)

    def _hand_over(self) -> None:
        if self.state != "ready" or self._holding or self._process is None:
            return
        for stream in self._held.values():
            self._process.send(wire.Submit(stream.request))
        self._held.clear()

    def _hear(self, message: wire.FromEngine) -> None:
        if isinstance(message, wire.Events):
            for wrapped in message.events:
                self._tell(wrapped.event)
        elif isinstance(message, wire.Rejected):
            stream = self._streams.get(message.id)
            if stream is not None:
                error = Finished(
                    message.id, "error", len(stream.request.prompt), 0, 0, message=message.message
                )
                self._tell(error)
        elif isinstance(message, wire.Loading):
            self.loading = (message.done, message.total)
        elif isinstance(message, wire.Ready):
            self.about, self.error, self.context = message, None, message.context
            log.info("%s is ready after %.1f s", self.model.name, message.seconds)
            self._ready_since = time.monotonic()
            self._set("ready")
            self._hand_over()
        elif isinstance(message, wire.Failed):
            self.error = message.message
            log.error("%s cannot be loaded: %s", self.model.name, message.message)

    def _tell(self, event: Event) -> None:
        stream = self._streams.get(event.id)
        if stream is None:
            return
        stream.begun = True
        stream.sent = stream.sent or isinstance(event, Tokens)
        if isinstance(event, Finished):
            self._forget(stream)
            self._ends.append(time.monotonic())
            self._changed.set()
        if not stream.put(event):
            log.warning("a reader left %d events lying: its request is ended", UNREAD)
            self._cancel(stream)
            stream.end(EngineLost("the answer was not read"))

    def _forget(self, stream: RequestStream) -> None:
        self._streams.pop(stream.request.id, None)
        self._held.pop(stream.request.id, None)

    def _cancel(self, stream: RequestStream) -> None:
        """Nobody reads it any more. What the engine has stays in the books until it says so."""
        if stream.request.id in self._held or self._process is None:
            self._forget(stream)
            self._changed.set()
        elif stream.request.id in self._streams:
            self._process.send(wire.Cancel(stream.request.id))

    def _set(self, state: State) -> None:
        self.state = state
        self._changed.set()
