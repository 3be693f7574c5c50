"""The events of one request, between what brings them and the one task that reads them."""

import asyncio
from collections.abc import AsyncIterator, Callable

from ..engine.api import Event, Finished, Progress, Request
from .client import EngineLost

UNREAD = 16_384  # events that a reader may leave lying before its request is ended


class RequestStream:
    """The events of one request, whichever engine they come from."""

    def __init__(self, request: Request, cancel: Callable[["RequestStream"], None]) -> None:
        self.request = request
        self.begun = False  # an engine works on it
        self.sent = False  # the reader has a token, or will
        self.ended = False  # nothing more is to be told
        self.tries = 0  # engines that died with it
        self._cancel = cancel
        self._absorbed = -1
        self._queue: asyncio.Queue[Event | EngineLost | None] = asyncio.Queue()

    def __aiter__(self) -> AsyncIterator[Event]:
        return self

    async def __anext__(self) -> Event:
        event = await self._queue.get()
        if event is None or isinstance(event, EngineLost | Finished):
            self._queue.put_nowait(None)  # whoever asks again
        if event is None:
            raise StopAsyncIteration
        if isinstance(event, EngineLost):
            raise event
        return event

    async def aclose(self) -> None:
        if not self.ended:
            self._cancel(self)
        self.ended = True
        while not self._queue.empty():
            self._queue.get_nowait()
        self._queue.put_nowait(None)

    def put(self, event: Event) -> bool:
        """False if the reader lags too far behind."""
        if self.ended:
            return True
        self.ended = isinstance(event, Finished)
        if isinstance(event, Progress):
            if event.done <= self._absorbed:
                return True  # a replayed prompt: the reader has seen more than this
            self._absorbed = event.done
        self._queue.put_nowait(event)
        return self.ended or self._queue.qsize() < UNREAD

    def end(self, error: EngineLost) -> None:
        """Tell the reader that no more will come, unless it knows."""
        if not self.ended:
            self.ended = True
            self._queue.put_nowait(error)
