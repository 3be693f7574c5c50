"""Several streams of events as one, with signs of life while they are silent."""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Sequence
from typing import Any

from ..engine.api import Progress
from ..errors import Ds4Error
from .served import Settings

END = object()


async def merged(
    sources: Sequence[Any], settings: Settings, alive: bytes = b": keep-alive\n\n"
) -> AsyncIterator[tuple[int, Any]]:
    """(number of the source, its event) as they come; bytes are to be sent as they are.

    A source is iterated asynchronously and closed with `aclose`. What one raises is raised here,
    and the others are given up.
    """
    queue: asyncio.Queue[tuple[int, Any]] = asyncio.Queue(maxsize=64)
    tasks = [asyncio.create_task(_pump(n, source, queue)) for n, source in enumerate(sources)]
    running, told = len(tasks), 0.0
    try:
        while running:
            try:
                async with asyncio.timeout(settings.keepalive_s):
                    index, item = await queue.get()
            except TimeoutError:
                yield 0, alive
                continue
            if item is END:
                running -= 1
            elif isinstance(item, BaseException):
                raise item
            elif not isinstance(item, Progress):
                yield index, item
            elif time.monotonic() - told >= settings.progress_s:
                told = time.monotonic()
                yield index, f": prefill {item.done}/{item.total}\n\n".encode() + alive
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _pump(index: int, source: Any, queue: asyncio.Queue[tuple[int, Any]]) -> None:
    """Put a source's events into the queue, then END or the error that ended it."""
    last: Any = END
    try:
        async for event in source:
            await queue.put((index, event))
    except Exception as error:
        last = error
    finally:
        with contextlib.suppress(Ds4Error):
            await source.aclose()
    await queue.put((index, last))
