"""From the bytes of a request to what the engine is to do. Runs in a worker thread."""

import json
import time
import uuid
from dataclasses import dataclass, replace
from typing import Any

import deepseek_recipe as recipe

from ..engine.api import Grammar
from ..errors import PromptError
from ..sampler import SamplingParams
from ..tokenizer import Tokenizer
from . import bodies
from .bodies import Wishes
from .dialect import MODEL, OPTIONS, Dialect, Run
from .errors import ApiError
from .grammar import Format, Shape, build, json_schema
from .output import OutputParser
from .schema import GrammarCheck, check_schema
from .served import Served, ServedModel
from .tools import for_grammar

IGNORE_EOS = -10_000.0  # added to the end token's logit


@dataclass
class Prepared:
    """A request that can be submitted, `n` times with as many seeds."""

    dialect: Dialect
    served: ServedModel
    run: Run
    ids: list[int]
    params: SamplingParams
    shape: Shape
    grammar: Grammar | None
    stream: bool
    thinks: bool
    body: bytes
    converted: Any

    def parser(self) -> OutputParser:
        generator = self.dialect.generator(self.body, self.converted, self.run)
        options = self.converted.parsing_options
        tokenizers = self.served.recipe_tokenizer, self.served.tokenizer
        parallel, tools = self.run.wishes.parallel, self.converted.conversation.tools
        return OutputParser(generator, options, *tokenizers, parallel, tools)


def prepare(dialect: Dialect, raw: bytes, served: Served) -> Prepared:
    """Raises ApiError for whatever a client may have done wrong."""
    body = bodies.decode(raw)
    model = served.pick(body.get("model"))
    name = body["model"]
    items = _continued(body, served) if dialect.prefix == "resp_" else None
    wishes = dialect.adapt(body, model.tokenizer.size)
    wishes.items = items
    _ = model.recipe_tokenizer  # read here, in a worker, at the first request
    data, converted = convert(dialect, body)
    conversation, inference = converted.conversation, converted.inference_options
    ids = encode(model, conversation, wishes)
    context = model.client.context
    room = context - len(ids)
    if room < 1:
        raise too_long(dialect, len(ids), context)
    thinks = _thinks(converted.parsing_options)
    shape = _shape(conversation, wishes, thinks)
    longest = inference.max_tokens or converted.resolve_max_tokens(len(ids), context)
    try:
        params = SamplingParams(
            max_tokens=min(longest, room),
            stop=_stops(converted.parsing_options),
            logprobs=(inference.top_logprobs or 0) if inference.logprobs else None,
            **_sampling(body, inference, wishes, thinks and not served.settings.client_sampling),
        )
    except PromptError as error:
        raise ApiError(400, str(error)) from error
    if wishes.ignore_eos:
        bias = {**params.logit_bias, model.tokenizer.eos_id: IGNORE_EOS}
        params = replace(params, logit_bias=bias)
    run = Run(dialect.prefix + uuid.uuid4().hex, name, wishes, int(time.time()))
    stream, grammar = bool(converted.stream), _grammar(shape, model.tokenizer)
    return Prepared(
        dialect, model, run, ids, params, shape, grammar, stream, thinks, data, converted
    )


def convert(dialect: Dialect, body: dict[str, Any]) -> tuple[bytes, Any]:
    """deepseek-recipe's view of an adapted body, and the body it saw. Raises ApiError."""
    data = bodies.encode({**body, "model": MODEL})
    try:
        converted = dialect.request(data).convert(OPTIONS)
    except recipe.ConversionError as error:
        found = json.loads(error.body)["error"]
        raise ApiError(error.status_code, found["message"], param=found.get("param")) from error
    except (ValueError, TypeError) as error:
        raise ApiError(400, str(error)) from error
    if any(message.image_sources for message in converted.conversation.messages):
        raise ApiError(400, "a message holds a picture: the model reads only text")
    return data, converted


def encode(model: ServedModel, conversation: Any, wishes: Wishes) -> list[int]:
    """The prompt's ids. Raises ApiError."""
    effort = conversation.reasoning_effort if wishes.effort else "low"  # the release's own default
    continues = wishes.continues and not conversation.thinking_mode
    try:
        return model.encoder.encode(conversation, effort, wishes.schema, continues)
    except (PromptError, ValueError, OverflowError) as error:  # such as a schema's 10**400
        raise ApiError(400, str(error)) from error


def checked(grammars: GrammarCheck, prepared: Prepared) -> None:
    """Refuse schemas that cannot be kept; loosen those that nobody asked to keep strictly."""
    if prepared.grammar is None:
        return
    problem = grammars.problem(prepared.grammar)
    if problem and any(not tool.strict for tool in prepared.shape.tools):
        prepared.grammar = build(_loose(prepared.shape), prepared.served.tokenizer)
        assert prepared.grammar is not None
        problem = grammars.problem(prepared.grammar)
    if problem:
        raise ApiError(400, f"the form asked for cannot be kept: {problem}", code="invalid_schema")


def _grammar(shape: Shape, tokenizer: Tokenizer) -> Grammar | None:
    """Of schemas within their bounds. Raises ApiError."""
    for tool in shape.tools:
        check_schema(tool.parameters, f"the schema of {tool.name}")
    if shape.format is not None:
        text = shape.format.text
        check_schema(json.loads(text) if shape.format.kind == "json_schema" else text, "the format")
    try:
        return build(shape, tokenizer)
    except ApiError:
        if all(tool.strict for tool in shape.tools):
            raise
        return build(_loose(shape), tokenizer)


def _loose(shape: Shape) -> Shape:
    tools = [tool if tool.strict else replace(tool, parameters={}) for tool in shape.tools]
    return replace(shape, tools=tools)


def too_long(dialect: Dialect, tokens: int, context: int) -> ApiError:
    """In the words by which agents know that they must shorten the conversation."""
    if dialect.prefix == "msg_":
        return ApiError(400, f"prompt is too long: {tokens} tokens > {context - 1} maximum")
    return ApiError(
        400,
        f"This model's maximum context length is {context} tokens, and the prompt has {tokens}: "
        "shorten it",
        code="context_length_exceeded",
        param="messages",
    )


def _continued(body: dict[str, Any], served: Served) -> list[Any]:
    """The items of a response's input, after those of the response that it continues."""
    given = body.get("input")
    items = [{"role": "user", "content": given}] if isinstance(given, str) else given
    items = list(items) if isinstance(items, list) else []
    before = body.pop("previous_response_id", None)
    if before is None:
        return items
    stored = served.responses.get(before) if isinstance(before, str) else None
    if stored is None:
        message = f"no response {before!r} is stored: send its items instead"
        raise ApiError(404, message, param="previous_response_id", code="not_found")
    body["input"] = items = stored.conversation() + items
    body["previous_response_id"] = before
    return items


def _thinks(options: Any) -> bool:
    stage = options.thinking_initial_stage
    return stage is not None and bool(stage.starts_in_reasoning())


def _stops(options: Any) -> tuple[str, ...]:
    """What the engine may stop at by itself: a thought or a call may hold it."""
    if options.thinking_initial_stage is not None or options.parse_tool_calls:
        return ()
    return tuple(options.stop_sequences)


def _shape(conversation: Any, wishes: Wishes, thinks: bool) -> Shape:
    form = wishes.format or _format(conversation)
    calls = conversation.tool_choice != "none" and bool(conversation.tools)
    limits = wishes.required or wishes.allowed is not None
    tools = []
    if limits or (calls and (wishes.strict or form is not None)):
        tools = for_grammar(conversation.tools, wishes.strict, wishes.allowed)
    return Shape(form, tools, wishes.required, wishes.parallel, thinks)


def _format(conversation: Any) -> Format | None:
    kind = conversation.response_format
    if kind == "json_schema":
        return Format(kind, json_schema(conversation.response_schema))
    if kind == "json_object":
        return Format("json_schema", json_schema({"type": "object"}))
    return Format(kind, conversation.response_regex) if kind == "regex" else None


def _sampling(
    body: dict[str, Any], inference: Any, wishes: Wishes, model_decides: bool
) -> dict[str, Any]:
    if model_decides:
        kept: dict[str, Any] = {
            name: wishes.sampling[name]
            for name in ("seed", "logit_bias")
            if name in wishes.sampling
        }
        return {"temperature": inference.temperature, "top_p": round(inference.top_p, 4), **kept}
    # deepseek-recipe has checked these, but returns them in single precision
    chosen = {name: body[name] for name in ("temperature", "top_p") if body.get(name) is not None}
    return {**chosen, **wishes.sampling}
