"""A small HTTP client for load: one connection, server-sent events, the time of each."""

import asyncio
import json
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any


@dataclass
class Answer:
    """What came of one request. `times` are those of its events, in time.perf_counter's seconds."""

    status: int = 0
    sent: float = 0.0
    headers: dict[str, str] = field(default_factory=dict)
    times: list[float] = field(default_factory=list)
    last: str = ""  # the last event's data
    whole: bool = False  # ended with [DONE]
    error: str | None = None  # an error event's message

    @property
    def ttft(self) -> float:
        return self.times[0] - self.sent

    @property
    def gaps(self) -> list[float]:
        return [b - a for a, b in zip(self.times, self.times[1:], strict=False)]


class Connection:
    """One connection to a server on this machine, kept open as long as it goes."""

    def __init__(self, port: int, key: str | None = None) -> None:
        self._port = port
        self._key = f"x-api-key: {key}\r\n" if key else ""
        self._reader: asyncio.StreamReader | None = None
        self._writer: asyncio.StreamWriter | None = None

    async def stream(self, path: str, body: dict[str, Any], answer: Answer) -> AsyncIterator[str]:
        """Post, and yield the data of each event, noted in `answer`, until the stream ends."""
        if self._reader is None or self._writer is None:
            self._reader, self._writer = await asyncio.open_connection("127.0.0.1", self._port)
        raw = json.dumps(body).encode()
        head = f"POST {path} HTTP/1.1\r\nhost: localhost\r\n{self._key}content-length: {len(raw)}"
        answer.sent = time.perf_counter()
        self._writer.write(head.encode() + b"\r\n\r\n" + raw)
        lines = (await self._reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
        answer.status = int(lines[0].split(" ")[1])
        pairs = (line.partition(": ") for line in lines[1:] if line)
        answer.headers = {name.lower(): value for name, _, value in pairs}
        if "content-length" in answer.headers:
            answer.last = (
                await self._reader.readexactly(int(answer.headers["content-length"]))
            ).decode()
        else:
            async for event in self._events():
                answer.last = event
                if event == "[DONE]":
                    answer.whole = True
                elif event.startswith('{"error"'):
                    answer.error = json.loads(event)["error"]["message"]
                else:
                    answer.times.append(time.perf_counter())
                yield event
        if answer.headers.get("connection") == "close":
            self.close()

    async def post(self, path: str, body: dict[str, Any]) -> Answer:
        """Post, and read to the end."""
        answer = Answer()
        async for _ in self.stream(path, body, answer):
            pass
        return answer

    def __enter__(self) -> "Connection":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()
        self._reader = self._writer = None

    async def _events(self) -> AsyncIterator[str]:
        assert self._reader is not None
        text = b""
        while size := int(await self._reader.readline(), 16):
            text += (await self._reader.readexactly(size + 2))[:-2]
            *events, text = text.split(b"\n\n")
            for event in events:
                if event.startswith(b"data: "):
                    yield event[6:].decode()
                elif b"\ndata: " in event:
                    yield event.partition(b"\ndata: ")[2].decode()
        await self._reader.readline()


def percentile(values: list[float], part: float) -> float:
    """Of unsorted values; 0 if there are none."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(part * len(ordered)))] if ordered else 0.0
