"""An OpenAI-compatible server of somebody else's: answers in words, one event each."""

import asyncio
import json
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route


@dataclass
class StandIn:
    """`strict` refuses fields that OpenAI's API lacks; `counts` tells usage; `status` fails all.

    Prompts of more than `context` tokens are refused.
    `delay_s` passes before each word. `bodies` are the requests.
    """

    strict: bool = False
    counts: bool = True
    status: int = 200
    context: int = 1 << 20
    delay_s: float = 0.0
    bodies: list[dict[str, Any]] = field(default_factory=list)

    async def models(self, request: Request) -> Response:
        return JSONResponse({"object": "list", "data": [{"id": "peer-model"}]})

    async def answer(self, request: Request) -> Response:
        body = await request.json()
        if self.strict and "ignore_eos" in body:
            return JSONResponse({"error": {"message": "unknown field ignore_eos"}}, 400)
        if len(str(body.get("prompt"))) // 4 > self.context:
            return JSONResponse({"error": {"message": "exceeds the context"}}, 400)
        if self.status != 200 and body["max_tokens"] > 1:
            return JSONResponse({"error": {"message": "on fire"}}, self.status)
        self.bodies.append(body)
        return StreamingResponse(self._events(body), media_type="text/event-stream")

    async def _events(self, body: dict[str, Any]) -> AsyncIterator[str]:
        chat = "messages" in body
        prompt = body["messages"][0]["content"] if chat else body["prompt"]
        count = body["max_tokens"]
        for i in range(count):
            await asyncio.sleep(self.delay_s)
            words = {"delta": {"content": " word"}} if chat else {"text": " word"}
            reason = "length" if i == count - 1 else None
            piece = {"choices": [{"index": 0, "finish_reason": reason} | words], "usage": None}
            yield f"data: {json.dumps(piece)}\n\n"
        yield ": a comment\n\n"
        if self.counts:
            usage = {
                "prompt_tokens": len(prompt) // 4,
                "completion_tokens": count,
                "prompt_tokens_details": {"cached_tokens": 0},
            }
            yield f"data: {json.dumps({'choices': [], 'usage': usage})}\n\n"
        yield "data: [DONE]\n\n"

    @contextmanager
    def serve(self) -> Iterator[str]:
        """Its address, while it runs in a thread."""
        routes = [
            Route("/v1/models", self.models),
            Route("/v1/completions", self.answer, methods=["POST"]),
            Route("/v1/chat/completions", self.answer, methods=["POST"]),
        ]
        config = uvicorn.Config(
            Starlette(routes=routes), host="127.0.0.1", port=0, log_level="error", lifespan="off"
        )
        server = uvicorn.Server(config)
        thread = threading.Thread(target=server.run)
        thread.start()
        try:
            while not server.started:
                thread.join(0.01)
            port = server.servers[0].sockets[0].getsockname()[1]
            yield f"http://127.0.0.1:{port}"
        finally:
            server.should_exit = True
            thread.join()
