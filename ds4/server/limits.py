"""How much one request may take before any work is done for it: size, depth, time, and how many.

The layer below the guard. It reads the body, so that what follows has all of it or never runs.
"""

import asyncio
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from ..engine.api import QueueFull
from .answers import App, Message, Receive, Scope, Send, header, refuse

_STRING = re.compile(rb'"(?:[^"\\]|\\.)*"?', re.DOTALL)  # an open one ends with the body: no retry
_BRACKETS = b"[]{}"
_OTHERS = bytes(set(range(256)) - set(_BRACKETS))
GENERATE = frozenset({"/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/messages"})
_BIG = 256 * 1024  # bytes that are checked in a thread


@dataclass(frozen=True)
class Limits:
    """Of one request, and of all.

    body          bytes of a body
    depth         nested lists and objects in it
    piece_s       seconds until the next piece of it
    whole_s       seconds until all of it is there
    request_s     seconds until a request has been answered in full
    at_once       requests at one time
    at_once_each  of them, with one API key
    """

    body: int = 32 * 2**20
    bodies: int = 512 * 2**20
    depth: int = 128
    piece_s: float = 15.0
    whole_s: float = 120.0
    request_s: float = 6 * 3600.0
    at_once: int = 2048
    at_once_each: int = 512


class Limiter:
    """The ASGI layer. While `draining`, only what has no body is answered.

    full  why no request can be queued, if so: asked before the body of one is read
    """

    def __init__(self, app: App, limits: Limits, full: Callable[[], QueueFull | None]) -> None:
        self._app, self._limits, self._full = app, limits, full
        self._running: Counter[str] = Counter()
        self._bytes = 0  # of their bodies
        self.draining = False

    @property
    def running(self) -> int:
        return self._running.total()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] != "POST":
            return await self._app(scope, receive, send)
        owner = scope["state"].get("owner", "-")
        self._running[owner] += 1
        body, complete = bytearray(), False
        try:
            self._admit(scope, owner)
            if not await self._read(receive, body):
                return None  # the client has gone
            complete = True
            await self._check(body)
            replay = _Replay(bytes(body), receive)
            async with asyncio.timeout(self._limits.request_s):
                await self._app(scope, replay, send)
        except _Refusal as no:
            await refuse(send, no.status, str(no), (), no.retry_after_s, close=not complete)
        finally:
            self._running[owner] -= 1
            self._bytes -= len(body)

    def _admit(self, scope: Scope, owner: str) -> None:
        """Raises _Refusal for what the headers alone rule out."""
        if self.draining:
            raise _Refusal(503, "the server is ending", 30)
        if self.running > self._limits.at_once:
            raise _Refusal(503, "too many requests are running", 2)
        if self._running[owner] > self._limits.at_once_each:
            raise _Refusal(
                429, f"this key may have {self._limits.at_once_each} requests at once", 2
            )
        names = {name for name, _ in scope["headers"]}
        if {b"content-length", b"transfer-encoding"} <= names:  # what smugglers send
            raise _Refusal(400, "give a length or send chunks, not both")
        if scope["path"] in GENERATE and (full := self._full()):
            raise _Refusal(429, str(full), round(full.retry_after_s))
        size = header(scope, b"content-length") or b"0"
        if not size.isdigit() or int(size) > self._limits.body:
            raise _Refusal(413, self._too_large)
        if header(scope, b"content-encoding") not in (None, b"identity"):
            raise _Refusal(415, "send the body uncompressed")

    async def _read(self, receive: Receive, body: bytearray) -> bool:
        """Fill `body`; False if the client left. Raises _Refusal if it is too long or too slow."""
        more = True
        try:
            async with asyncio.timeout(self._limits.whole_s):
                while more:
                    async with asyncio.timeout(self._limits.piece_s):
                        message = await receive()
                    if message["type"] == "http.disconnect":
                        return False
                    piece, more = message.get("body", b""), message.get("more_body", False)
                    body += piece
                    self._bytes += len(piece)
                    if len(body) > self._limits.body:
                        raise _Refusal(413, self._too_large)
                    if self._bytes > self._limits.bodies:
                        raise _Refusal(503, "the requests that are running are too large", 5)
        except TimeoutError:
            raise _Refusal(408, "the body did not come in time") from None
        return True

    async def _check(self, body: bytearray) -> None:
        """Raises _Refusal for what is not worth parsing."""
        given = body, self._limits.depth
        big = len(body) > _BIG
        fault = await asyncio.to_thread(json_fault, *given) if big else json_fault(*given)
        if fault:
            raise _Refusal(400, fault)

    @property
    def _too_large(self) -> str:
        return f"a body may have {self._limits.body} bytes"


class _Replay:
    """The body that was read, and then whatever else comes: that the client has gone."""

    def __init__(self, body: bytes, receive: Receive) -> None:
        self._body: Message | None = {"type": "http.request", "body": body, "more_body": False}
        self._receive = receive

    async def __call__(self) -> Message:
        if self._body is None:
            return await self._receive()
        body, self._body = self._body, None
        return body


class _Refusal(Exception):
    def __init__(self, status: int, message: str, retry_after_s: int | None = None) -> None:
        super().__init__(message)
        self.status, self.retry_after_s = status, retry_after_s


def json_fault(body: bytes | bytearray, deepest: int) -> str | None:
    """Why a body cannot be JSON that is worth parsing, in time linear in its length."""
    try:
        body.decode("utf-8")
    except UnicodeDecodeError as error:
        return f"the body is not UTF-8: see byte {error.start}"
    if body.count(b"[") + body.count(b"{") <= deepest:
        return None
    brackets = _STRING.sub(b"", body).translate(None, _OTHERS)
    steps = np.where(np.isin(np.frombuffer(brackets, np.uint8), list(b"[{")), 1, -1)
    if steps.size and int(np.cumsum(steps, dtype=np.int64).max()) > deepest:
        return f"the body nests deeper than {deepest}"
    return None
