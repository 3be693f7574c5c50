"""POST /v1/completions: text in, text on. No chat, no thoughts, no tools."""

import asyncio
import time
import uuid
from collections.abc import AsyncIterator
from dataclasses import dataclass, replace
from typing import Any

from ..engine.api import Event, Finished, Progress, Request, Tokens
from ..errors import PromptError
from ..sampler import SamplingParams, TokenLogprob
from ..tokenizer import Tokenizer
from . import bodies
from .answer import FINGERPRINT, Clock
from .client import EventStream
from .dialect import openai_error, sse
from .errors import ApiError, told
from .merge import merged
from .prepare import IGNORE_EOS
from .served import Served, ServedModel

MAX_PROMPTS = 128
DEFAULT_TOKENS = 16  # as OpenAI's


@dataclass
class Prepared:
    """Prompts by number of the choice: each comes `n` times."""

    model: ServedModel
    id: str
    name: str
    created: int
    prompts: list[list[int]]
    params: SamplingParams
    stream: bool
    include_usage: bool
    echo: bool


def prepare(raw: bytes, served: Served) -> Prepared:
    """Raises ApiError."""
    body = bodies.decode(raw)
    model = served.pick(body.get("model"))
    if body.get("suffix"):
        raise ApiError(400, "suffix is not supported", param="suffix")
    n = bodies.number(body, "n", 1, 16, whole=True) or 1
    if (bodies.number(body, "best_of", 1, 16, whole=True) or n) != n:
        raise ApiError(400, "best_of must be n", param="best_of")
    prompts = [ids for ids in _prompts(body.get("prompt"), model) for _ in range(n)]
    if len(prompts) > MAX_PROMPTS:
        raise ApiError(400, f"n times the prompts may be {MAX_PROMPTS}", param="n")
    context = model.client.context
    longest = max(map(len, prompts))
    if longest >= context:
        message = f"This model's maximum context length is {context} tokens, and the prompt has "
        raise ApiError(400, f"{message}{longest}", code="context_length_exceeded", param="prompt")
    options = body.get("stream_options")
    usage = isinstance(options, dict) and bodies.flag(options, "include_usage")
    return Prepared(
        model,
        f"cmpl-{uuid.uuid4().hex}",
        body["model"],
        int(time.time()),
        prompts,
        _params(body, model),
        bodies.flag(body, "stream"),
        usage,
        bodies.flag(body, "echo"),
    )


def _params(body: dict[str, Any], model: ServedModel) -> SamplingParams:
    stop = body.get("stop")
    stop = [stop] if isinstance(stop, str) else stop or []
    if not isinstance(stop, list) or len(stop) > 16 or not all(isinstance(s, str) for s in stop):
        raise ApiError(400, "stop must be a string or up to 16 of them", param="stop")
    fields = {
        "max_tokens": bodies.number(body, "max_tokens", 1, 1 << 31, whole=True) or DEFAULT_TOKENS,
        "temperature": bodies.number(body, "temperature", 0, 2),
        "top_p": bodies.number(body, "top_p", 0, 1),
        "logprobs": bodies.number(body, "logprobs", 0, 20, whole=True),
        "seed": bodies.seed(body),
        **bodies.sampling(body, model.tokenizer.size),
    }
    if bodies.flag(body, "ignore_eos"):
        bias = fields.get("logit_bias") or {}
        fields["logit_bias"] = {**bias, model.tokenizer.eos_id: IGNORE_EOS}
    try:
        given = {name: value for name, value in fields.items() if value is not None}
        return SamplingParams(stop=tuple(stop), **given)
    except PromptError as error:
        raise ApiError(400, str(error)) from error


def _prompts(given: Any, model: ServedModel) -> list[list[int]]:
    """A text, token ids, or a list of either."""
    tokenizer = model.tokenizer
    if given is None:
        given = ""
    several = isinstance(given, list) and not all(isinstance(each, int) for each in given)
    listed = given if several else [given]
    if not listed or len(listed) > MAX_PROMPTS:
        raise ApiError(400, f"prompt: from 1 to {MAX_PROMPTS} of them", param="prompt")
    found = []
    for each in listed:
        if isinstance(each, str):
            try:
                found.append([tokenizer.bos_id, *tokenizer.encode(each)])
            except PromptError as error:
                raise ApiError(400, str(error), param="prompt") from error
        elif isinstance(each, list) and each and all(_is_id(token, tokenizer) for token in each):
            found.append(each)
        else:
            raise ApiError(400, "prompt must be text or a list of token ids", param="prompt")
    return found


def _is_id(token: Any, tokenizer: Tokenizer) -> bool:
    return isinstance(token, int) and not isinstance(token, bool) and 0 <= token < tokenizer.size


class Completions:
    """Submitted prompts; `aclose` cancels what has not finished."""

    def __init__(self, served: Served, prepared: Prepared, streams: list[EventStream]) -> None:
        self._served, self._prepared, self._streams = served, prepared, streams
        self._choices = [_Choice(prepared, n) for n in range(len(streams))]

    @classmethod
    async def submit(cls, served: Served, prepared: Prepared) -> "Completions":
        """Raises Ds4Error if the engine does not take them all."""
        streams: list[EventStream] = []
        try:
            for n, ids in enumerate(prepared.prompts):
                seed = prepared.params.seed
                seed = None if seed is None else (seed + n) % (1 << 63)
                room = prepared.model.client.context - len(ids)
                longest = min(prepared.params.max_tokens or room, room)
                params = replace(prepared.params, seed=seed, max_tokens=longest)
                request = Request(f"{prepared.id}-{n}", ids, params)
                streams.append(await prepared.model.client.submit(request))
        except BaseException:
            for stream in streams:
                await stream.aclose()
            raise
        return cls(served, prepared, streams)

    async def aclose(self) -> None:
        for stream in self._streams:
            await stream.aclose()

    async def whole(self) -> dict[str, Any]:
        """Raises Ds4Error."""
        await asyncio.gather(*map(self._run, range(len(self._streams))))
        choices = [choice.whole() for choice in self._choices]
        return self._object(choices, usage=self._usage(), timings=self._choices[-1].timings)

    async def stream(self) -> AsyncIterator[bytes]:
        usage: dict[str, Any] = {"usage": None} if self._prepared.include_usage else {}
        try:
            async for n, event in merged(self._streams, self._served.settings):
                if isinstance(event, bytes):
                    yield event
                elif (chunk := self._choices[n].took(event)) is not None:
                    yield sse(None, self._object([chunk], **usage))
        except Exception as error:
            yield sse(None, openai_error(told(error, self._prepared.id)))
            return
        if self._prepared.include_usage:
            timings = self._choices[-1].timings
            yield sse(None, self._object([], usage=self._usage(), timings=timings))
        yield b"data: [DONE]\n\n"

    async def _run(self, n: int) -> None:
        async for event in self._streams[n]:
            self._choices[n].took(event)

    def _usage(self) -> dict[str, Any]:
        n = len(self._prepared.prompts)
        distinct = {id(ids): ids for ids in self._prepared.prompts}  # n choices share a prompt
        prompt = sum(map(len, distinct.values()))
        written = sum(choice.written for choice in self._choices[:n])
        return {
            "prompt_tokens": prompt,
            "completion_tokens": written,
            "total_tokens": prompt + written,
            "prompt_tokens_details": {"cached_tokens": self._choices[0].cached},
        }

    def _object(self, choices: list[Any], **more: Any) -> dict[str, Any]:
        p = self._prepared
        head = {"id": p.id, "object": "text_completion", "created": p.created, "model": p.name}
        return {**head, "system_fingerprint": FINGERPRINT, "choices": choices, **more}


class _Choice:
    """One continuation, as it grows."""

    def __init__(self, prepared: Prepared, index: int) -> None:
        self._index, self._tokenizer = index, prepared.model.tokenizer
        self._wanted = prepared.params.logprobs
        self._prompt = prepared.prompts[index]
        self._echo = prepared.echo
        self._clock = Clock()
        self._parts: list[str] = []
        self._logprobs: list[TokenLogprob] = []
        self._offset = 0
        self._reason: str | None = None
        self.written = self.cached = 0
        self.timings: dict[str, Any] = {}

    def took(self, event: Event) -> dict[str, Any] | None:
        """The chunk that an event brings, if any. Raises ApiError for an engine that failed."""
        self._clock.saw(event)
        if isinstance(event, Progress):
            return None
        text = event.text
        if self._echo:
            text, self._echo = self._tokenizer.decode(self._prompt[1:]) + text, False
        logprobs: list[TokenLogprob] = []
        if isinstance(event, Tokens):
            self.written += len(event.tokens)
            logprobs = list(event.logprobs or ())
        else:
            self._finish(event)
        self._parts.append(text)
        self._logprobs += logprobs
        if not (text or logprobs or self._reason):
            return None
        return self._choice(text, logprobs)

    def whole(self) -> dict[str, Any]:
        self._offset = 0
        return self._choice("".join(self._parts), self._logprobs)

    def _finish(self, event: Finished) -> None:
        if event.reason == "error":
            raise ApiError(500, event.message or "the engine failed", code="engine_error")
        if event.reason == "cancelled":
            raise ApiError(503, "the server ended this request", code="cancelled", retry_after=5)
        self._reason, self.cached = event.reason, event.cached_tokens
        self.timings = self._clock.timings(event.prompt_tokens, self.written, event)

    def _choice(self, text: str, logprobs: list[TokenLogprob]) -> dict[str, Any]:
        told = None if self._wanted is None else self._told(logprobs)
        return {"index": self._index, "text": text, "logprobs": told, "finish_reason": self._reason}

    def _told(self, logprobs: list[TokenLogprob]) -> dict[str, Any]:
        decode = self._tokenizer.decode
        tokens = [decode([each.token]) for each in logprobs]
        offsets = []
        for token in tokens:
            offsets.append(self._offset)
            self._offset += len(token)
        return {
            "tokens": tokens,
            "token_logprobs": [each.logprob for each in logprobs],
            "top_logprobs": [{decode([t]): p for t, p in each.top} for each in logprobs],
            "text_offset": offsets,
        }
