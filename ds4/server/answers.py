"""Errors that are answered before a request reaches an endpoint, in a form every dialect reads."""

import json
from collections.abc import Awaitable, Callable, Iterable, MutableMapping
from typing import Any

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]
Headers = Iterable[tuple[bytes, bytes]]

_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    408: "timeout_error",
    413: "request_too_large",
    415: "invalid_request_error",
    429: "rate_limit_error",
    503: "overloaded_error",
    504: "timeout_error",
}


async def refuse(
    send: Send,
    status: int,
    message: str,
    headers: Headers = (),
    retry_after_s: int | None = None,
    close: bool = False,
) -> None:
    """Answer with an error that OpenAI's, Anthropic's and other clients all understand.

    `close` ends the connection: what is left of the request is not read.
    """
    error = {"type": _TYPES[status], "message": message, "code": status, "param": None}
    body = json.dumps({"type": "error", "error": error}).encode()
    sent = [
        (b"content-type", b"application/json"),
        (b"content-length", str(len(body)).encode()),
        *headers,
    ]
    if retry_after_s is not None:
        sent.append((b"retry-after", str(retry_after_s).encode()))
    if close:
        sent.append((b"connection", b"close"))
    await send({"type": "http.response.start", "status": status, "headers": sent})
    await send({"type": "http.response.body", "body": body})


def header(scope: Scope, name: bytes) -> bytes | None:
    """The one value of a header; None if it is missing or there more than once."""
    values = [value for key, value in scope["headers"] if key == name]
    return values[0] if len(values) == 1 else None
