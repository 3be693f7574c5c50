"""Who gets in, what is written down, and how the server ends. Everything over real sockets."""

import base64
import contextlib
import itertools
import json
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from bench.server_load import children
from ds4.server.access import OneLine
from ds4.server.security import Hosts, Keys, SecurityError, check_exposure

from .engine_child import LONG
from .server_process import KEY, ServerProcess, bearer, completion, read_all

OTHER = "o" * 32
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
    with ServerProcess(keys=str(keys)) as process:
        yield process


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
            process.until_closed()  # two signals at once would be one
            with pytest.raises(subprocess.TimeoutExpired):
                process.process.wait(1)
            process.process.send_signal(signal.SIGTERM)
            process.process.wait(30)


@pytest.mark.parametrize("nohup", [False, True])
def test_a_server_ends_with_its_terminal_but_for_nohup(nohup: bool, tmp_path: Path) -> None:
    ours, theirs = os.openpty()
    file, before = tmp_path / "keys", signal.getsignal(signal.SIGHUP)
    file.write_text("a" * 32)
    signal.signal(signal.SIGHUP, signal.SIG_IGN if nohup else signal.SIG_DFL)  # a child inherits it
    try:
        process = ServerProcess(terminal=theirs, keys=str(file))
    finally:
        signal.signal(signal.SIGHUP, before)
        os.close(theirs)
    with process:
        process.until_ready()
        _exchange_keys(process, file, "b" * 32)
        os.close(ours)
        if nohup:
            _exchange_keys(process, file, "c" * 32)
        else:
            assert process.process.wait(60) == 0


def _exchange_keys(process: ServerProcess, file: Path, key: str) -> None:
    file.write_text(key)
    process.process.send_signal(signal.SIGHUP)
    end = time.monotonic() + 60
    while process.ask("GET", "/metrics", headers=bearer(key))[0] != 200:
        assert time.monotonic() < end, "the keys were not read again"
        time.sleep(0.05)


def test_what_drains_too_long_ends_with_an_error() -> None:
    with ServerProcess(step_s=0.5, drain_s=1) as process:
        process.until_ready()
        with process.connect(completion(LONG, max_tokens=3900)) as sock:
            first = sock.recv(65536)
            process.process.send_signal(signal.SIGTERM)
            answer = first + read_all(sock)
        assert b"the server is ending" in answer
        assert process.process.wait(60) == 0
