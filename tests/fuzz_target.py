"""The whole application, to be sent what fuzzing.py makes."""

import asyncio
import json
from typing import Any

from starlette.types import ASGIApp

from ds4.engine.api import Request
from ds4.loader import find_model
from ds4.server.app import create_app
from ds4.server.client import ModelInfo
from ds4.server.local import LocalClient
from ds4.server.served import ServedModel
from tests.fake_engine import FakeEngine, demo_tokenizer

SECONDS = 60  # in which a request must be answered, on however busy a machine
D = "｜DSML｜"
HEAD = f'\n\n<{D}tool_calls>\n<{D}invoke name="f">\n'
ANSWERS = (
    "Some words.",
    '{"a": "x"}',
    f'{HEAD}<{D}parameter name="a" string="true">x</{D}parameter>\n</{D}invoke>\n</{D}tool_calls>',
    f'{HEAD}<{D}parameter name="b" string="false">[1, tw</{D}parameter>\n</{D}invoke>\n'
    f'<{D}invoke name="apply_patch">\n<{D}parameter name="input" string="true">*** Begin',
    f"Well,{HEAD}</{D}invoke>\n</{D}tool_calls>",
)


def reply(request: Request) -> str:
    """One of the answers, which one the prompt says; a thought before it some of the time."""
    number = sum(request.prompt)
    return ("hm</think>" if number % 2 else "") + ANSWERS[number // 2 % len(ANSWERS)]


class Target:
    """The application in this process, over an engine that answers at once."""

    def __init__(self) -> None:
        tokenizer = demo_tokenizer()
        self.engine = FakeEngine(tokenizer, reply)
        self.client = LocalClient(self.engine, ModelInfo("m", tokenizer.size), 4096)
        self.app = create_app([ServedModel.from_folder(self.client, find_model("demo"))])
        self.loop = asyncio.new_event_loop()

    def check(self, path: str, body: bytes) -> int:
        """The status; an assertion fails for a 5xx, a broken stream or an answer that hangs."""
        return self.loop.run_until_complete(self.post(path, body))

    async def post(self, path: str, body: bytes) -> int:
        """The same, on `loop`; several may be under way."""
        status, headers, text = await asyncio.wait_for(_call(self.app, path, body), SECONDS)
        self.engine.requests.clear()  # or a million of them are kept
        assert status < 500, (path, text, body)
        if headers[b"content-type"].startswith(b"text/event-stream"):
            assert b"internal_error" not in text, (path, text, body)
            assert b"server_error" not in text, (path, text, body)
        else:
            json.loads(text)
        return status

    def close(self) -> None:
        self.loop.close()
        self.client.close()


async def _call(app: ASGIApp, path: str, body: bytes) -> tuple[int, dict[bytes, bytes], bytes]:
    """Status, headers and body of one POST, as uvicorn would ask for it and less dear than HTTP."""
    scope = {
        **{"type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": "POST"},
        **{"scheme": "http", "path": path, "raw_path": path.encode(), "query_string": b""},
        **{"root_path": "", "client": ("127.0.0.1", 1), "server": ("127.0.0.1", 80)},
        "headers": [(b"host", b"test"), (b"content-length", str(len(body)).encode())],
    }
    parts, sent = [{"type": "http.request", "body": body, "more_body": False}], []

    async def receive() -> dict[str, Any]:
        if not parts:
            await asyncio.sleep(10 * SECONDS)  # the client stays until it is answered
        return parts.pop() if parts else {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        sent.append(message)

    await app(scope, receive, send)
    text = b"".join(message.get("body", b"") for message in sent[1:])
    assert not sent[-1].get("more_body"), (path, "the answer does not end", body)
    return sent[0]["status"], dict(sent[0]["headers"]), text
