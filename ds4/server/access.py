"""What is written down about requests: never their text, and nothing that could forge a line."""

import logging
import re
import secrets
import sys
import time

from .answers import App, Message, Receive, Scope, Send, header

log = logging.getLogger("ds4.access")

_ID = re.compile(rb"[A-Za-z0-9_.:-]{1,64}")
_CONTROL = [*range(32), 127, *range(128, 160), 0x2028, 0x2029, *range(0x202A, 0x202F)]
_ESCAPED = {code: f"\\x{code:02x}" for code in _CONTROL}


def escaped(text: str, most: int = 200) -> str:
    """Text from outside as one line without control characters, cut short."""
    return text[:most].translate(_ESCAPED)


class OneLine(logging.Formatter):
    """A record is one line; those of a traceback are set off by a bar."""

    def __init__(self) -> None:
        super().__init__("{asctime} {levelname} {name}: {message}", style="{")

    def format(self, record: logging.LogRecord) -> str:
        trace = record.exc_info or record.exc_text
        shown = logging.makeLogRecord(record.__dict__ | {"exc_info": None, "exc_text": None})
        line = super().format(shown).translate(_ESCAPED)
        if not trace or not isinstance(record.exc_info, tuple):
            return line
        lines = self.formatException(record.exc_info).splitlines()
        return "\n".join([line, *("  | " + part.translate(_ESCAPED) for part in lines)])


def set_up_logging(level: str) -> None:
    """Everything to standard error, a line each."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(OneLine())
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
    for chatty in ("uvicorn.error", "httpx", "httpcore", "asyncio"):
        logging.getLogger(chatty).setLevel(logging.WARNING)


class AccessLog:
    """The outermost ASGI layer: gives each request an id, and writes a line when it has ended."""

    def __init__(self, app: App) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        given = header(scope, b"x-request-id") or b""
        name = given if _ID.fullmatch(given) else secrets.token_hex(8).encode()
        state = scope.setdefault("state", {})
        state["request_id"] = name.decode()
        start, status = time.monotonic(), 0

        async def noting(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = [
                    pair for pair in message.get("headers", ()) if pair[0] != b"x-request-id"
                ]
                message["headers"] = [*headers, (b"x-request-id", name)]
            await send(message)

        try:
            await self._app(scope, receive, noting)
        finally:
            log.info(
                "%s %s %s %d %.0f ms, key %s, from %s",
                state["request_id"],
                escaped(scope["method"], 20),
                escaped(scope["path"]),
                status,
                1000 * (time.monotonic() - start),
                state.get("owner", "-"),
                (scope.get("client") or ("-",))[0],
            )
