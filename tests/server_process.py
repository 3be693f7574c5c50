"""A server in a process of its own, spoken to as the internet would: by bytes."""

import contextlib
import http.client
import json
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
KEY = "k" * 32
POST = f"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nX-Api-Key: {KEY}\r\n".encode()
IN_TERMINAL = (
    "import fcntl, os, sys, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0); "
    "os.execv(sys.argv[1], sys.argv[1:])"
)
LENGTH = b"Content-Length: %d\r\n\r\n"


class ServerProcess:
    """`options` are those of tests.serve_fake; `terminal` is to be the one it is started from."""

    def __init__(
        self, stderr: Any = subprocess.DEVNULL, terminal: int | None = None, **options: Any
    ) -> None:
        command = [sys.executable, "-m", "tests.serve_fake", json.dumps(options)]
        if terminal is not None:
            command = [sys.executable, "-c", IN_TERMINAL, *command]
        self.process = subprocess.Popen(
            command,
            stdin=terminal,
            start_new_session=terminal is not None,
            stdout=subprocess.PIPE,
            stderr=stderr,
            text=True,
            cwd=ROOT,
        )
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line, "the server did not start"
        self.port = int(line)

    def __enter__(self) -> "ServerProcess":
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.communicate()

    def ask(
        self, method: str, path: str, body: Any = None, headers: Mapping[str, str] | None = None
    ) -> tuple[int, dict[str, str], bytes]:
        """Status, headers and body of one request on a connection of its own."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
        raw = body if body is None or isinstance(body, bytes | str) else json.dumps(body)
        with contextlib.closing(connection):
            connection.request(method, path, raw, dict(headers or {}))
            answer = connection.getresponse()
            return answer.status, {k.lower(): v for k, v in answer.getheaders()}, answer.read()

    @contextlib.contextmanager
    def connect(self, first: bytes = b"") -> Iterator[socket.socket]:
        """A bare connection."""
        with socket.create_connection(("127.0.0.1", self.port), timeout=30) as sock:
            sock.sendall(first)
            yield sock

    def until_ready(self) -> "ServerProcess":
        end = time.monotonic() + 60
        while self.ask("GET", "/ready")[0] != 200:
            assert time.monotonic() < end, "the server is not ready"
            time.sleep(0.05)
        return self

    def until_closed(self) -> None:
        """Until it takes no more connections."""
        end = time.monotonic() + 60
        with contextlib.suppress(OSError, http.client.HTTPException):
            while self.ask("GET", "/health"):
                assert time.monotonic() < end, "the server goes on"
                time.sleep(0.05)


def read_all(sock: socket.socket) -> bytes:
    """What comes until the other side closes, however it does that."""
    parts = []
    with contextlib.suppress(ConnectionError):
        while part := sock.recv(65536):
            parts.append(part)
    return b"".join(parts)


def bearer(key: str) -> dict[str, str]:
    return {"authorization": f"Bearer {key}"}


def completion(*prompt: int, **more: object) -> bytes:
    """A request for a stream, as it is sent."""
    asked = {"model": "fake", "prompt": prompt or (1, 2, 3), "stream": True} | more
    body = json.dumps(asked).encode()
    return POST + LENGTH % len(body) + body
