"""Who gets in, and what a request may cost before it is refused. Everything over real sockets."""

import asyncio
import base64
import contextlib
import itertools
import json
import logging
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from bench.server_load import children
from ds4.engine.api import QueueFull
from ds4.server.access import OneLine
from ds4.server.limits import Limiter, Limits, json_fault
from ds4.server.security import Hosts, Keys, SecurityError, check_exposure

from .engine_child import LONG
from .server_process import ServerProcess, read_all

KEY, OTHER = "k" * 32, "o" * 32
SMALL = {"body": 20_000, "bodies": 60_000, "piece_s": 0.5, "whole_s": 1.5, "at_once": 6}
ROUTES = [
    ("GET", "/"),
    ("GET", "/page.js"),
    ("GET", "/metrics"),
    ("GET", "/v1/models"),
    ("GET", "/docs"),
    ("POST", "/v1/chat/completions"),
    ("POST", "/v1/completions"),
    ("POST", "/v1/responses"),
    ("POST", "/v1/messages"),
    ("POST", "/v1/messages/count_tokens"),
    ("POST", "/tokenize"),
    ("POST", "/detokenize"),
    ("OPTIONS", "/v1/chat/completions"),
    ("DELETE", "/v1/responses/x"),
]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    keys = tmp_path_factory.mktemp("keys") / "keys"
    keys.write_text(f"# ours\n{KEY}\n")
    with ServerProcess(keys=str(keys), limits=SMALL, headers_s=3.0, reader_s=1.0) as process:
        yield process


def bearer(key: str) -> dict[str, str]:
    return {"authorization": f"Bearer {key}"}


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({}, 401),
        (bearer(OTHER), 401),
        (bearer(""), 401),
        ({"authorization": f"Negotiate {KEY}"}, 401),
        ({"authorization": "Basic !!!"}, 401),
        ({"x-api-key": KEY[:-1]}, 401),
        ({"x-api-key": KEY + "k"}, 401),
        ({"x-api-key": OTHER} | bearer(KEY), 401),
        ({"cookie": f"key={KEY}"}, 401),
        (bearer(KEY) | {"host": "evil.example"}, 403),
        (bearer(KEY) | {"host": "127.0.0.1.evil.example:80"}, 403),
        (bearer(KEY) | {"host": ""}, 403),
        (bearer(KEY) | {"host": "192.168.1.1"}, 403),
        (bearer(KEY) | {"origin": "https://evil.example"}, 403),
        (bearer(KEY) | {"origin": "null"}, 403),
    ],
)
def test_every_route_is_closed(server: ServerProcess, headers: dict[str, str], status: int) -> None:
    for method, path in ROUTES:
        got, sent, body = server.ask(method, path, headers=headers)
        assert got == status, (method, path)
        error = json.loads(body)
        assert error["type"] == "error"
        assert error["error"]["message"]
        assert sent["x-request-id"]
        assert "access-control-allow-origin" not in sent


def test_a_path_is_taken_as_it_was_sent(server: ServerProcess) -> None:
    tricks = ["//v1/models", "/%76%31/models", "/health/../v1/models", "/v1//models", "/%2fmetrics"]
    tricks += ["/health%2f..%2fmetrics", "/ready/../metrics", "/\\metrics", "/v1/./models"]
    for path, headers in itertools.product(tricks, [{}, bearer(OTHER), bearer(KEY)]):
        assert server.ask("GET", path, headers=headers)[0] in (400, 404), path
    for path in ("/health/", "/healthz", "/ready?x", "/HEALTH", "/health;x", "/metrics?/health"):
        expected = 401 if path != "/ready?x" else 200
        got = server.until_ready().ask("GET", path)[0]
        assert got == expected, path
    with server.connect(b"GET http://x/health HTTP/1.1\r\nHost: localhost\r\n\r\n") as sock:
        assert b"200" not in sock.recv(65536).split(b"\r\n")[0]


@pytest.mark.skipif(sys.platform != "linux", reason="it reads /proc")
def test_nothing_else_listens(server: ServerProcess) -> None:
    server.until_ready()
    pids = [server.process.pid, *children(server.process.pid)]
    assert len(pids) == 2
    held = set()
    for pid in pids:
        for fd in Path(f"/proc/{pid}/fd").iterdir():
            with contextlib.suppress(OSError):
                held.add(fd.readlink().name)
    listening = []
    for table in ("tcp", "tcp6", "udp", "udp6"):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            fields = line.split()
            ours = f"socket:[{fields[9]}]" in held
            if ours and (fields[3] == "0A" or table.startswith("udp")):
                listening.append(fields[1])
    assert listening == [f"0100007F:{server.port:04X}"]


def test_those_with_the_key_get_in(server: ServerProcess) -> None:
    basic = base64.b64encode(f"me:{KEY}".encode()).decode()
    ways = [bearer(KEY), {"x-api-key": KEY}, {"authorization": f"Basic {basic}"}]
    ways += [bearer(KEY) | {"x-api-key": KEY}, {"authorization": f"bearer {KEY}"}]
    ways += [bearer(KEY) | {"origin": f"http://127.0.0.1:{server.port}"}]
    ways += [bearer(KEY) | {"host": "localhost:1"}]
    for headers in ways:
        status, sent, _ = server.ask("GET", "/metrics", headers=headers)
        assert status == 200, headers
        assert sent["x-content-type-options"] == "nosniff"
        assert "server" not in sent
    assert server.ask("GET", "/health")[0] == 200
    challenge = server.ask("GET", "/")[1]["www-authenticate"]
    assert challenge.startswith("Basic")


def test_request_ids_are_kept_if_harmless(server: ServerProcess) -> None:
    assert server.ask("GET", "/health", headers={"x-request-id": "a-1"})[1]["x-request-id"] == "a-1"
    odd = server.ask("GET", "/health", headers={"x-request-id": "a b\x7f"})
    assert odd[1].get("x-request-id") != "a b\x7f"


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


POST = f"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nX-Api-Key: {KEY}\r\n".encode()
LENGTH = b"Content-Length: %d\r\n\r\n"
CHUNKED = b"Transfer-Encoding: chunked\r\n\r\n"


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


def completion(*prompt: int, **more: object) -> bytes:
    asked = {"model": "fake", "prompt": prompt or (1, 2, 3), "stream": True} | more
    body = json.dumps(asked).encode()
    return POST + LENGTH % len(body) + body


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


def test_nobody_is_let_in_by_accident() -> None:
    check_exposure("127.0.0.1", Keys())
    check_exposure("::1", Keys())
    check_exposure("0.0.0.0", Keys([KEY]))
    for host in ("0.0.0.0", "::", "192.168.1.2", "example.org", ""):
        with pytest.raises(SecurityError, match="API key"):
            check_exposure(host, Keys())


def test_keys_of_a_file(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    for text, match in (("", "no API key"), ("short\n", "fewer than 16"), ("é" * 20, "ASCII")):
        file.write_text(text)
        with pytest.raises(SecurityError, match=match):
            Keys(file=file)
    with pytest.raises(SecurityError, match="cannot be read"):
        Keys(file=tmp_path / "absent")
    file.write_text(KEY)
    keys = Keys(file=file)
    file.write_text("bad")
    with pytest.raises(SecurityError):
        keys.reload()
    assert keys.owner(KEY.encode())
    file.write_text(OTHER)
    keys.reload()
    assert keys.owner(KEY.encode()) is None
    assert KEY not in repr(vars(keys))


def test_hosts() -> None:
    local, open_ = Hosts("127.0.0.1", ["box.lan"]), Hosts("0.0.0.0")
    for host in (b"localhost:8000", b"127.0.0.1", b"[::1]:80", b"BOX.lan", b"127.9.9.9"):
        assert host in local
    for host in (None, b"", b"evil", b"10.0.0.1", b"localhost.evil", b"[::1", b"::1.evil"):
        assert host not in local or host == b"[::1"
    assert b"10.0.0.1:80" in open_
    assert b"evil" not in open_


def test_depth_is_measured_outside_strings() -> None:
    assert json_fault(b'{"a": "' + b"[" * 500 + b'"}', 10) is None
    assert json_fault(b"[[]," * 100, 99) == "the body nests deeper than 99"
    assert json_fault(b'"\\"x",' * 100_000 + b"[" * 500, 10)  # linear, whatever is escaped
    assert json_fault(b'["\\\\", ' + b"[" * 20, 10)


def test_no_line_of_the_log_can_be_forged() -> None:
    try:
        raise ValueError("first\nINFO forged")
    except ValueError:
        trace = sys.exc_info()
    record = logging.makeLogRecord(
        {"msg": "a\r\nINFO forged \x1b[2J%s", "args": ("\u2028x\x9b",), "exc_info": trace}
    )
    lines = OneLine().format(record).split("\n")
    assert "\x1b" not in lines[0]
    assert lines[0].endswith("a\\x0d\\x0aINFO forged \\x1b[2J\\x2028x\\x9b")
    assert all(line.startswith("  | ") for line in lines[1:])


def test_logs_have_no_prompts(tmp_path: Path) -> None:
    log = tmp_path / "log"
    with log.open("w") as file, ServerProcess(stderr=file, log="debug") as process:
        process.until_ready()
        secret = {"model": "fake", "messages": [{"role": "user", "content": "SECRET"}]}
        assert process.ask("POST", "/v1/chat/completions", secret)[0] == 200
        process.ask("POST", "/v1/chat/completions", '{"SECRET": [')
        process.ask("POST", "/v1/chat/completions", secret | {"temperature": "SECRET"})
        process.ask("GET", "/x?SECRET=1", headers={"x-api-key": "SECRET"})
    assert "/v1/chat/completions 200" in log.read_text()
    assert "SECRET" not in log.read_text()


def test_a_signal_drains_and_a_second_one_ends() -> None:
    with ServerProcess(step_s=0.1, drain_s=60) as process:
        process.until_ready()
        with process.connect(completion()) as sock:
            first = sock.recv(65536)
            process.process.send_signal(signal.SIGTERM)
            answer = first + read_all(sock)
        assert b'"finish_reason":"stop"' in answer  # what had begun came to its end
        assert b"[DONE]" in answer
        assert process.process.wait(60) == 0
    with ServerProcess(step_s=3600, drain_s=60) as process:
        process.until_ready()
        with process.connect(completion()):
            for _ in range(3):  # by then the request has been read
                process.ask("GET", "/health")
            process.process.send_signal(signal.SIGTERM)
            with pytest.raises(subprocess.TimeoutExpired):
                process.process.wait(1)
            process.process.send_signal(signal.SIGTERM)
            process.process.wait(30)


def test_what_drains_too_long_ends_with_an_error() -> None:
    with ServerProcess(step_s=0.5, drain_s=1) as process:
        process.until_ready()
        with process.connect(completion(LONG, max_tokens=3900)) as sock:
            first = sock.recv(65536)
            process.process.send_signal(signal.SIGTERM)
            answer = first + read_all(sock)
        assert b"the server is ending" in answer
        assert process.process.wait(60) == 0
