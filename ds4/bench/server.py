"""Any OpenAI-compatible server as a target, ours or a peer's, by its streamed answers."""

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any, Literal

import httpx

from ..errors import BenchError
from ..power.sampler import now
from .load import Job, Load, Texts
from .target import check
from .texts import PlainTexts, prose

Api = Literal["completions", "chat"]
# of text, from all over it, whose tokens are counted; short ones for a small context
_PIECES, _PIECE, _SHORT_PIECE = 16, 250, 20


class ServerTarget:
    """`url` ends before /v1. Raises BenchError if the server does not answer.

    Outputs are asked to go on after an end token (`ignore_eos`); a server that refuses the field is
    asked without, and its outputs may be shorter. Lengths of prompts are set by a first request,
    of which the server counts the tokens.
    """

    context: int | None = None

    def __init__(
        self,
        url: str,
        about: dict[str, Any],
        api: Api = "completions",
        key: str | None = None,
        timeout_s: float = 600.0,
    ) -> None:
        self._url = url.rstrip("/").removesuffix("/v1") + "/v1"
        self._path = "/chat/completions" if api == "chat" else "/completions"
        self._api = api
        self._headers = {"authorization": f"Bearer {key}"} if key else {}
        self._timeout = httpx.Timeout(timeout_s, connect=10.0)
        self._extra: dict[str, Any] = {}
        self._prose = prose()
        self.about = about | {"url": self._url, "api": api}
        asyncio.run(self._meet())

    def texts(self, seed: int) -> Texts:
        return PlainTexts(self._prose, self._per_token, seed)

    def usage(self) -> dict[str, Any]:
        return {}

    def close(self) -> None:
        """Every run has its own connections."""

    def _client(self) -> httpx.AsyncClient:
        limits = httpx.Limits(max_connections=None)
        return httpx.AsyncClient(
            headers=self._headers, timeout=self._timeout, limits=limits, trust_env=False
        )

    # getting to know it

    async def _meet(self) -> None:
        try:
            async with self._client() as client:
                answer = await client.get(f"{self._url}/models")
                answer.raise_for_status()
                self._model = str(answer.json()["data"][0]["id"])
                self.about = {"model": self._model} | self.about
                await self._probe(client)
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            raise BenchError(f"{self._url}: no answer: {error or type(error).__name__}") from error
        except (ValueError, KeyError, IndexError, TypeError) as error:
            raise BenchError(f"{self._url}/models: the answer lists no model") from error

    async def _probe(self, client: httpx.AsyncClient) -> None:
        usage, sample = await self._first_usage(client)
        if not self._extra:
            self.about["note"] = "the server takes no ignore_eos: outputs may end early"
        counted = usage.get("prompt_tokens") or 0
        if not counted:
            self.about["note"] = "the server counts no tokens: lengths are estimates"
        self._per_token = len(sample) / counted if counted else 4.0

    async def _first_usage(self, client: httpx.AsyncClient) -> tuple[dict[str, Any], str]:
        """What the server counts of a text, which is shorter where its context is."""
        step = len(self._prose) // _PIECES
        refusal = None
        for piece in _PIECE, _SHORT_PIECE:
            sample = "".join(self._prose[i * step :][:piece] for i in range(_PIECES))
            for extra in {"ignore_eos": True}, {}:
                self._extra = extra
                try:
                    return await self._usage_of(client, Job("probe", sample, 1, 0.0, 0)), sample
                except _Refused as refused:
                    refusal = refused
        raise BenchError(f"{self._url}{self._path}: {refusal}") from refusal

    async def _usage_of(self, client: httpx.AsyncClient, job: Job) -> dict[str, Any]:
        usage: dict[str, Any] = {}
        async for piece in self._pieces(client, job):
            usage = piece.get("usage") or usage
        return usage

    # a load

    def run(self, load: Load) -> None:
        asyncio.run(self._run(load))

    async def _run(self, load: Load) -> None:
        tasks: set[asyncio.Task[None]] = set()
        async with self._client() as client:
            try:
                while not load.over:
                    tasks |= {
                        asyncio.create_task(self._request(client, load, job))
                        for job in load.due(now())
                    }
                    wait = load.wait(now())
                    if not tasks:
                        await asyncio.sleep(wait or 0.0)
                        continue
                    done, tasks = await asyncio.wait(
                        tasks, timeout=wait, return_when=asyncio.FIRST_COMPLETED
                    )
                    for task in done:
                        task.result()
                    check(load)
            finally:
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)

    async def _request(self, client: httpx.AsyncClient, load: Load, job: Job) -> None:
        text, reason, error = "", "", None
        usage: dict[str, Any] = {}
        try:
            async for piece in self._pieces(client, job):
                usage = piece.get("usage") or usage
                for choice in piece.get("choices") or []:
                    more = _text_of(choice)
                    reason = choice.get("finish_reason") or reason
                    if more:
                        text += more
                        load.arrived(job.id, now(), 1)
        except (_Refused, httpx.HTTPError, ValueError) as failure:
            error = str(failure) or type(failure).__name__
        details = usage.get("prompt_tokens_details") or {}
        counts = (
            usage.get("prompt_tokens"),
            details.get("cached_tokens"),
            usage.get("completion_tokens"),
        )
        load.finished(job.id, now(), text, reason, error, counts)

    async def _pieces(self, client: httpx.AsyncClient, job: Job) -> AsyncIterator[dict[str, Any]]:
        """The objects of a streamed answer. Raises _Refused for a status of 400 and more."""
        body = {
            "model": self._model,
            "max_tokens": job.output_tokens,
            "temperature": job.temperature,
            "seed": job.seed % (1 << 31),
            "stream": True,
            "stream_options": {"include_usage": True},
            **self._extra,
        }
        if self._api == "chat":
            body["messages"] = [{"role": "user", "content": job.prompt}]
        else:
            body["prompt"] = job.prompt
        answer = await self._send(client, body)
        try:
            if answer.status_code >= 400:
                content = (await answer.aread()).decode(errors="replace")
                raise _Refused(f"HTTP {answer.status_code}: {content[:200]}")
            async for line in answer.aiter_lines():
                data = line.removeprefix("data:").strip()
                if line.startswith("data:") and data != "[DONE]":
                    piece = json.loads(data)
                    if piece.get("error"):
                        raise _Refused(str(piece["error"])[:200])
                    yield piece
        finally:
            await answer.aclose()

    async def _send(self, client: httpx.AsyncClient, body: dict[str, Any]) -> httpx.Response:
        def request() -> httpx.Request:
            return client.build_request("POST", self._url + self._path, json=body)

        try:
            return await client.send(request(), stream=True)
        except httpx.RemoteProtocolError:  # the server has just closed a connection that was kept
            return await client.send(request(), stream=True)


def _text_of(choice: dict[str, Any]) -> str:
    delta = choice.get("delta") or {}
    return str(
        choice.get("text")
        or delta.get("content")
        or delta.get("reasoning_content")
        or delta.get("reasoning")
        or ""
    )


class _Refused(Exception):
    """The server said no."""
