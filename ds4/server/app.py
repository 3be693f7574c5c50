"""The HTTP API as a Starlette application. What guards it, and what runs it, is elsewhere."""

import asyncio
import uuid
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route

from . import completions, listing
from .answer import Answers
from .chat import Chat
from .dialect import Dialect, openai_error
from .errors import ApiError, told
from .messages import Messages
from .prepare import checked, prepare
from .respond import ClientGone, EventStream, Json, until_gone
from .responses import Responses
from .served import Served, ServedModel, Settings

T = TypeVar("T")
Endpoint = Callable[[Request], Awaitable[Response]]


def create_app(models: Sequence[ServedModel], settings: Settings | None = None) -> Starlette:
    """The API over one or more models; the first is meant where a request names none."""
    api = _Api(Served(models, settings or Settings()))
    get, post = ["GET"], ["POST"]
    routes = [
        Route("/v1/chat/completions", api.dialect(Chat()), methods=post),
        Route("/v1/completions", api.completions, methods=post),
        Route("/v1/responses", api.dialect(Responses()), methods=post),
        Route("/v1/responses/{id}", api.stored, methods=["GET", "DELETE", "POST"]),
        Route("/v1/messages", api.dialect(Messages()), methods=post),
        Route("/v1/messages/count_tokens", api.worker(listing.count_tokens, True), methods=post),
        Route("/v1/models", api.models, methods=get),
        Route("/v1/models/{id:path}", api.models, methods=get),
        Route("/tokenize", api.worker(listing.tokenize), methods=post),
        Route("/detokenize", api.worker(listing.detokenize), methods=post),
    ]
    return Starlette(routes=routes, exception_handlers={HTTPException: _http_error})


class _Api:
    def __init__(self, served: Served) -> None:
        self._served = served
        self._workers = ThreadPoolExecutor(4, "ds4-prepare")
        self._checkers = ThreadPoolExecutor(2, "ds4-grammar")

    def dialect(self, dialect: Dialect) -> Endpoint:
        async def respond(request: Request) -> Response:
            return await self._guarded(request, dialect.error, self._chat(request, dialect))

        return respond

    async def completions(self, request: Request) -> Response:
        async def work() -> Response:
            prepared = await self._work(completions.prepare, await request.body(), self._served)
            answers = await completions.Completions.submit(self._served, prepared)
            return await _answered(request, answers, prepared.stream)

        return await self._guarded(request, openai_error, work())

    def worker(self, function: Any, anthropic: bool = False) -> Endpoint:
        """An endpoint that needs no engine."""

        async def respond(request: Request) -> Response:
            async def work() -> Response:
                return Json(await self._work(function, await request.body(), self._served))

            error = Messages().error if anthropic else openai_error
            return await self._guarded(request, error, work())

        return respond

    async def models(self, request: Request) -> Response:
        name = request.path_params.get("id")
        if name is None:
            return Json(listing.models(self._served))
        if name not in self._served.models:
            error = ApiError(404, f"no model is called {name!r}", code="model_not_found")
            return Json(openai_error(error), 404)
        return Json(listing.card(self._served.models[name]))

    async def stored(self, request: Request) -> Response:
        name = request.path_params["id"]
        found = None if request.method == "POST" else self._served.responses.get(name)
        if found is None:
            return Json(openai_error(ApiError(404, f"no response {name!r} is stored")), 404)
        if request.method == "DELETE":
            self._served.responses.delete(name)
            return Json({"id": name, "object": "response", "deleted": True})
        return Response(found.response, media_type="application/json")

    async def _chat(self, request: Request, dialect: Dialect) -> Response:
        prepared = await self._work(prepare, dialect, await request.body(), self._served)
        if prepared.grammar is not None:
            await self._check(prepared)
        answers = await Answers.submit(self._served, prepared)
        return await _answered(request, answers, prepared.stream)

    async def _check(self, prepared: Any) -> None:
        """Try a grammar in a thread; the library's limits end what the time does not wait for."""
        loop = asyncio.get_running_loop()
        check = loop.run_in_executor(self._checkers, checked, self._served.grammars, prepared)
        try:
            await asyncio.wait_for(asyncio.shield(check), self._served.settings.grammar_s)
        except TimeoutError as error:
            check.add_done_callback(lambda done: done.cancelled() or done.exception())
            raise ApiError(400, "the schema takes too long to compile: simplify it") from error

    async def _work(self, function: Callable[..., T], *arguments: Any) -> T:
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._workers, function, *arguments)

    async def _guarded(
        self, request: Request, words: Callable[[ApiError], Any], work: Awaitable[Response]
    ) -> Response:
        """The response, or the error as the dialect tells it."""
        name = uuid.uuid4().hex
        try:
            response = await work
        except (ClientGone, ClientDisconnect):
            response = Response(status_code=499)
        except Exception as error:
            found = told(error, name)
            response = Json(words(found), found.status, found.headers)
        response.headers.setdefault("x-request-id", name)
        response.headers.setdefault("request-id", name)
        return response


async def _answered(request: Request, answers: Any, stream: bool) -> Response:
    if stream:
        return EventStream(answers.stream(), answers, {})
    try:
        return Json(await until_gone(request.receive, answers.whole()))
    finally:
        await answers.aclose()


async def _http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    found = ApiError(error.status_code, error.detail)
    return Json(openai_error(found), error.status_code, dict(error.headers or {}))
