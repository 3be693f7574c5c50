"""What a request may cost before it is refused, and how slowly it may come or be read."""

import asyncio
import contextlib
import json
import re
import socket
import time
from collections.abc import Iterator

import pytest

from ds4.engine.api import QueueFull
from ds4.server.limits import Limiter, Limits, json_fault

from .engine_child import LONG
from .server_process import KEY, POST, ServerProcess, bearer, completion, read_all

SMALL = {"body": 20_000, "bodies": 60_000, "piece_s": 0.5, "whole_s": 1.5, "at_once": 6}
CHUNKED = b"Transfer-Encoding: chunked\r\n\r\n"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    keys = tmp_path_factory.mktemp("keys") / "keys"
    keys.write_text(f"{KEY}\n")
    with ServerProcess(keys=str(keys), limits=SMALL, headers_s=3.0, reader_s=1.0) as process:
        yield process


@pytest.mark.parametrize(
    ("body", "status"),
    [
        (b'{"prompt": "\xff\xfe"}', 400),
        (b"[" * 10_000, 400),
        (b'{"a":' * 3000 + b"1" + b"}" * 3000, 400),
        (b'{"a": "' + b"x" * 30_000 + b'"}', 413),
    ],
)
def test_bodies_that_are_not_worth_parsing(server: ServerProcess, body: bytes, status: int) -> None:
    got, _, answer = server.ask("POST", "/v1/chat/completions", body, bearer(KEY))
    assert got == status
    assert json.loads(answer)["error"]["code"] == status


def test_compressed_bodies_are_refused(server: ServerProcess) -> None:
    headers = bearer(KEY) | {"content-encoding": "gzip"}
    assert server.ask("POST", "/v1/chat/completions", b"\x1f\x8b", headers)[0] == 415


@pytest.mark.parametrize(
    ("sent", "status"),
    [
        (b"GET /health HTTP/1.1\r\nHost: localhost\r\n" + b"X: " + b"y" * 70_000, b"400"),
        (b"GET /health HTTP/1.1\r\nHost: localhost\r\n" + b"X: y\r\n" * 20_000, b"400"),
        (b"GET /health HTTP/1.1\r\n\r\n", b"400"),  # no Host
        (b"GET /health HTTP/1.1\r\nHost: localhost\r\nHost: evil\r\n\r\n", b"400"),
        (b"\x16\x03\x01\x02\x00" * 20 + b"\r\n\r\n", b"400"),
        (POST + b"Content-Length: 5\r\nContent-Length: 6\r\n\r\n", b"400"),
        (POST + b"Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", b"400"),
        (POST + b"Content-Length: -1\r\n\r\n", b"400"),
        (POST + b"Content-Length: 99999999999\r\n\r\n", b"413"),
        (POST + CHUNKED + (b"1000\r\n" + b"x" * 4096 + b"\r\n") * 9, b"413"),
        (POST + CHUNKED + b"ffffffffffffffffffffff\r\n", b"400"),
        (POST + b"Content-Length: 100\r\n\r\n{", b"408"),  # and then nothing
    ],
)
def test_odd_requests(server: ServerProcess, sent: bytes, status: bytes) -> None:
    with server.connect() as sock:
        with contextlib.suppress(ConnectionError):  # it need not wait for the rest
            sock.sendall(sent)
        answer = read_all(sock)
    assert not answer or answer.split(b" ")[1] == status
    assert server.ask("GET", "/health")[0] == 200


def test_a_body_that_trickles_is_cut_off(server: ServerProcess) -> None:
    with server.connect(POST + b"Content-Length: 100\r\n\r\n") as sock:
        answer = b""
        sock.settimeout(0.2)
        for _ in range(40):
            try:
                sock.sendall(b" ")
                answer += sock.recv(1000)
            except TimeoutError:
                continue
            except ConnectionError:
                break
            if answer:
                break
    assert b" 408 " in answer


def test_headers_that_trickle_are_cut_off(server: ServerProcess) -> None:
    with server.connect(b"GET /health HTTP/1.1\r\n") as slow, server.connect() as silent:
        with contextlib.suppress(ConnectionError):
            for n in range(100):
                slow.sendall(b"X-%d: y\r\n" % n)
                time.sleep(0.1)
        assert read_all(slow) == read_all(silent) == b""


def test_a_client_that_half_closes_is_let_go(server: ServerProcess) -> None:
    with server.connect(completion(LONG)) as sock:
        sock.shutdown(socket.SHUT_WR)
        read_all(sock)
    assert server.until_ready().ask("GET", "/health")[0] == 200


def test_a_client_that_does_not_read_is_cut_off(server: ServerProcess) -> None:
    def cancelled() -> float:
        text = server.ask("GET", "/metrics", headers=bearer(KEY))[2].decode()
        found = re.search(r'request_success_total\{finished_reason="cancelled".*\} (\S+)', text)
        return float(found[1]) if found else 0.0

    before = cancelled()
    with socket.socket() as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        sock.connect(("127.0.0.1", server.port))
        sock.sendall(completion(LONG, max_tokens=3900))
        end = time.monotonic() + 60
        while cancelled() == before:
            assert time.monotonic() < end
            time.sleep(0.1)
    assert server.ask("GET", "/health")[0] == 200


def test_one_key_has_its_share_and_all_have_an_end() -> None:
    """The layer alone: requests that run until they are released."""
    body = [{"type": "http.request", "body": b"{}"}]

    async def play() -> None:
        release, full = asyncio.Event(), None

        async def app(scope: object, receive: object, send: object) -> None:
            await release.wait()

        limiter = Limiter(app, Limits(at_once=3, at_once_each=2), lambda: full)

        async def ask(owner: str) -> int:
            scope = {"type": "http", "method": "POST", "path": "/v1/messages", "headers": []}
            scope["state"] = {"owner": owner}
            told: list[dict[str, int]] = []

            async def receive() -> dict[str, object]:
                return body[0]

            async def send(message: dict[str, int]) -> None:
                told.append(message)

            await limiter(scope, receive, send)
            return told[0]["status"] if told else 200

        running = [asyncio.create_task(ask(owner)) for owner in "aab"]
        await asyncio.sleep(0)
        assert limiter.running == 3
        assert await ask("a") == 503  # all have their fill
        running[2].cancel()
        await asyncio.sleep(0)
        assert await ask("a") == 429  # one has
        full = QueueFull("no room", 7.0)
        assert await ask("b") == 429
        limiter.draining = True
        assert await ask("b") == 503
        release.set()
        assert await asyncio.gather(*running[:2]) == [200, 200]
        assert limiter.running == 0

    asyncio.run(play())


def test_depth_is_measured_outside_strings() -> None:
    assert json_fault(b'{"a": "' + b"[" * 500 + b'"}', 10) is None
    assert json_fault(b"[[]," * 100, 99) == "the body nests deeper than 99"
    assert json_fault(b'"\\"x",' * 100_000 + b"[" * 500, 10)  # linear, whatever is escaped
    assert json_fault(b'["\\\\", ' + b"[" * 20, 10)
