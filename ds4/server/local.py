"""An engine in a thread of this process, for `--in-process` and for tests."""

import asyncio
import contextlib
import threading
from collections import deque
from collections.abc import AsyncIterator, Callable
from concurrent.futures import Future
from typing import TypeVar

from ..engine.api import EngineLike, Event, Finished, Request, Stats
from .client import EngineLost, ModelInfo

T = TypeVar("T")


class LocalClient:
    """Runs an engine in a thread; every call of the engine happens there. An EngineClient.

    An error that the engine raises from `step` ends it: streams raise EngineLost from then on.
    """

    def __init__(self, engine: EngineLike, model: ModelInfo, context: int) -> None:
        self.model, self.context = model, context
        self._engine = engine
        self._calls: deque[Callable[[], None]] = deque()
        self._wake = threading.Condition()
        self._streams: dict[str, _Stream] = {}  # touched by the thread only
        self._closing = False
        self._failure: BaseException | None = None
        self._thread = threading.Thread(target=self._work, name="ds4-engine", daemon=True)
        self._thread.start()

    @property
    def ready(self) -> bool:
        return self._failure is None and not self._closing

    async def submit(self, request: Request) -> "_Stream":
        """Queue a request. Raises PromptError, QueueFull, or EngineLost."""
        stream = _Stream(self, request.id, asyncio.get_running_loop())

        def start() -> None:
            self._engine.submit(request)
            self._streams[request.id] = stream

        call = asyncio.ensure_future(self._call(start))
        try:
            await asyncio.shield(call)
        except asyncio.CancelledError:
            # The engine may take the request all the same: it must not run for nobody.
            self.cancel(request.id)
            call.add_done_callback(lambda done: done.cancelled() or done.exception())
            raise
        return stream

    async def stats(self) -> Stats:
        return await self._call(self._engine.stats)

    def cancel(self, request_id: str) -> None:
        """End a request without waiting for it; unknown or finished: no effect."""
        self._post(lambda: self._engine.cancel(request_id))

    def close(self) -> None:
        """Stop the thread and the engine; streams in flight raise EngineLost."""
        with self._wake:
            self._closing = True
            self._wake.notify()
        self._thread.join()

    async def _call(self, function: Callable[[], T]) -> T:
        future: Future[T] = Future()

        def run() -> None:
            if not future.set_running_or_notify_cancel():
                return  # nobody waits for it any more
            try:
                future.set_result(function())
            except Exception as error:
                future.set_exception(error)

        self._post(run)
        return await asyncio.wrap_future(future)

    def _post(self, call: Callable[[], None]) -> None:
        with self._wake:
            if not self.ready:
                raise EngineLost(f"the engine has ended: {self._failure or 'closed'}")
            self._calls.append(call)
            self._wake.notify()

    def _work(self) -> None:
        try:
            while self._take_calls():
                for event in self._engine.step():
                    self._tell(event)
        except BaseException as error:
            self._failure = error
        with self._wake:
            self._closing = True
            left, self._calls = list(self._calls), deque()
        for call in left:  # nobody may wait for ever
            call()
        reason = f"the engine ended: {self._failure or 'closed'}"
        for stream in self._streams.values():
            stream.put(EngineLost(reason))
        self._engine.close()

    def _take_calls(self) -> bool:
        """Wait for work and carry out the calls; False when it is time to end."""
        with self._wake:
            while not (self._calls or self._closing or self._engine.has_work()):
                self._wake.wait()
            if self._closing:
                return False
            calls, self._calls = self._calls, deque()
        for call in calls:
            call()
        return True

    def _tell(self, event: Event) -> None:
        last = isinstance(event, Finished)
        stream = self._streams.pop(event.id, None) if last else self._streams.get(event.id)
        if stream is not None:
            stream.put(event)


class _Stream:
    """The events of one request, handed from the engine's thread to an event loop."""

    def __init__(self, client: LocalClient, request_id: str, loop: asyncio.AbstractEventLoop):
        self._client, self._id, self._loop = client, request_id, loop
        self._queue: asyncio.Queue[Event | EngineLost] = asyncio.Queue()
        self._ended = False

    def __aiter__(self) -> AsyncIterator[Event]:
        return self

    async def __anext__(self) -> Event:
        if self._ended:
            raise StopAsyncIteration
        event = await self._queue.get()
        if isinstance(event, EngineLost):
            self._ended = True
            raise event
        self._ended = isinstance(event, Finished)
        return event

    async def aclose(self) -> None:
        if not self._ended:
            self._ended = True
            with contextlib.suppress(EngineLost):  # then it runs no longer
                self._client.cancel(self._id)

    def put(self, event: Event | EngineLost) -> None:
        """Called by the engine's thread. A loop that is closed has no reader left."""
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._queue.put_nowait, event)
