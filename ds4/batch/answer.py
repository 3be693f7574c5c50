"""One request through the server's own endpoints, in this process: same checks, same answers."""

import asyncio
import json
from pathlib import Path
from typing import Any

import httpx

from ..engine.api import EngineLike
from ..errors import Ds4Error
from ..server.app import create_app
from ..server.client import ModelInfo
from ..server.local import LocalClient
from ..server.served import ServedModel
from .lines import Job, answered

_JSON = {"content-type": "application/json"}
AGAIN_S = 0.5  # after which a request is tried again that found the queue full


class Worker:
    """An engine and the endpoints over it. Use it in one event loop only."""

    def __init__(self, engine: EngineLike, info: ModelInfo, context: int, folder: Path) -> None:
        self._client = LocalClient(engine, info, context)
        app = create_app([ServedModel.from_folder(self._client, folder)])
        transport = httpx.ASGITransport(app)
        self._http = httpx.AsyncClient(transport=transport, base_url="http://ds4", timeout=None)

    async def answer(self, job: Job) -> dict[str, Any]:
        """The output line of a job. Raises Ds4Error if the engine has ended."""
        while True:
            body = json.dumps(job.body)  # ASCII: httpx's own has no bytes for half a surrogate pair
            response = await self._http.post(job.url, content=body, headers=_JSON)
            if response.status_code == 429:
                await asyncio.sleep(AGAIN_S)
                continue
            ended = response.status_code >= 500 and not self._client.ready
            if response.status_code == 503 or ended:
                raise Ds4Error(response.json()["error"]["message"])
            name = response.headers["x-request-id"]
            return answered(job, response.status_code, name, response.json())

    async def close(self) -> None:
        await self._http.aclose()
        self._client.close()


def open_worker(spec: dict[str, Any], progress: Any = None) -> Worker:
    """Load a model and its engine. `spec` is the arguments of ds4.load, or with `synthetic` those
    of loader.Synthetic and of load_synthetic; plain values, which can travel."""
    from .. import loader
    from ..engine import Engine

    options = dict(spec)
    model, synthetic = options.pop("model"), options.pop("synthetic", None)
    if synthetic is None:
        llm = loader.load(model, **options, progress=progress)
        folder = loader.find_model(model)
    else:
        llm = loader.load_synthetic(loader.Synthetic(**synthetic), **options, progress=progress)
        folder = loader.find_model("demo")
    if llm.tokenizer is None:
        raise Ds4Error(f"a batch needs words: {llm.wordless}")
    info = ModelInfo(Path(str(model)).name, llm.config.vocab_size)
    return Worker(Engine(llm), info, llm.context, folder)
