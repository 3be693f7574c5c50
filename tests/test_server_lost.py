"""The engine dies while answers stream: each ends as its API says that answers fail."""

import contextlib
import json
import os
import signal
import sys
import time

import pytest

from bench.server_load import children

from .server_process import ServerProcess, read_all

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="it reads /proc")

USER = [{"role": "user", "content": "Tell me of the sea."}]
OFF = {"thinking": {"type": "disabled"}}
STREAMS = {
    "/v1/chat/completions": ({"messages": USER} | OFF, b'"error":'),
    "/v1/completions": ({"prompt": "The sea"}, b'"error":'),
    "/v1/responses": ({"input": USER, "reasoning": {"effort": "none"}}, b"event: response.failed"),
    "/v1/messages": ({"messages": USER, "max_tokens": 50}, b"event: error"),
}


def test_every_dialect_says_that_it_was_lost() -> None:
    with ServerProcess(slots=4, step_s=0.15) as server, contextlib.ExitStack() as stack:
        server.until_ready()
        socks = {}
        for path, (body, _) in STREAMS.items():
            raw = json.dumps(body | {"model": "fake", "stream": True}).encode()
            head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n"
            head += f"Content-Length: {len(raw)}\r\n\r\n"
            socks[path] = stack.enter_context(server.connect(head.encode() + raw))
        written, end = dict.fromkeys(socks, b""), time.monotonic() + 60
        for path, sock in socks.items():
            while not any(word in written[path] for word in (b"sea", b"was", b"boat", b"old")):
                assert time.monotonic() < end
                written[path] += sock.recv(65536)
        os.kill(children(server.process.pid)[0], signal.SIGKILL)
        for path, sock in socks.items():
            written[path] += read_all(sock)
            assert STREAMS[path][1] in written[path], (path, written[path][-500:])
            assert b"SIGKILL" in written[path], (path, written[path][-500:])
        assert server.until_ready().ask("GET", "/health")[0] == 200
