"""`ds4 generate`: text that continues a prompt."""

import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from ..errors import PromptError
from . import options
from .groups import grouped
from .terminal import Screen, console, decode, read_file

if TYPE_CHECKING:
    from ..llm import LLM, Generation, Piece


@grouped
def generate(
    prompt: Annotated[
        str | None, typer.Argument(help="The text to continue; - or nothing reads standard input.")
    ] = None,
    file: Annotated[
        Path | None, typer.Option("--file", "-f", help="Read the prompt here.", show_default=False)
    ] = None,
    chat: Annotated[
        bool, typer.Option("--chat", help="Ask for an answer instead of a continuation.")
    ] = False,
    think: Annotated[
        Literal["off", "low", "high", "max"], typer.Option(help="How hard, with --chat.")
    ] = "off",
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    logprobs: Annotated[
        int | None,
        typer.Option(min=0, help="So many alternatives a token, in --json.", show_default=False),
    ] = None,
    *,
    place: options.Place,
    speculate: options.Speculate = "off",
    random: options.Random,
    max_tokens: options.MaxTokens = 256,
    sampling: options.Sampling,
) -> None:
    """Continue a prompt, which is an argument, a --file or standard input.

    The text appears as it is written; with --json, all at the end.
    """
    if logprobs is not None and not as_json:
        raise typer.BadParameter("it is shown in --json only", param_hint="--logprobs")
    if think != "off" and not chat:
        raise typer.BadParameter("it needs --chat", param_hint="--think")
    if speculate != "off" and random.synthetic is not None:
        raise typer.BadParameter("it needs a model with a meaning", param_hint="--speculate")
    text = _read(prompt, file)
    chosen = sampling.given(max_tokens=max_tokens, logprobs=logprobs)
    llm = options.load(place, random.model(place.model), speculate)
    placement = getattr(llm.runner.be, "placement", None)  # of experts in two memories
    request = [{"role": "user", "content": text}] if chat else text
    if as_json:
        generation = llm.generate(request, thinking=think, **chosen)
        name = random.synthetic or place.model
        report = _report(llm, generation, name, place.cache, think if chat else None)
        print(json.dumps(report))
    else:
        _write(llm.stream(request, thinking=think, **chosen), think, placement)
    if placement is not None:
        placement.save()


def _read(prompt: str | None, file: Path | None) -> str:
    """The prompt, from wherever it is. One line end at the end of a file or pipe is dropped."""
    if prompt is not None and file is not None:
        raise typer.BadParameter("give a prompt or --file, not both")
    if file is not None:
        return read_file(file)
    if prompt is not None and prompt != "-":
        return decode(os.fsencode(prompt), "the prompt")
    if prompt is None and sys.stdin.isatty():
        raise typer.BadParameter("give a prompt, --file or text on standard input")
    text = decode(sys.stdin.buffer.read(), "standard input").removesuffix("\n")
    if not text:
        raise PromptError("standard input is empty")
    return text


def _write(pieces: "Iterator[Piece]", think: str, placement: Any = None) -> None:
    """Stream to standard output, then tell a person on standard error how fast it was."""
    from ..chat import ReasoningSplitter

    screen, splitter = Screen(sys.stdout), ReasoningSplitter(think)
    try:
        for piece in pieces:
            thought, answer = splitter.push(piece.text)
            screen.thought(thought)
            screen.text(answer)
            generation = piece.generation
    except KeyboardInterrupt:
        screen.end()
        raise
    screen.thought(splitter.flush())
    screen.end()
    if generation is not None and sys.stderr.isatty():
        beside = console(stderr=True)
        beside.print(_speed(generation), style="dim")
        if placement is not None:
            beside.print(placement.report().line(), style="dim")


def _speed(generation: "Generation") -> str:
    usage, timings = generation.usage, generation.timings
    return (
        f"prompt {usage['prompt_tokens']} tokens, {timings['prefill_tok_s']:.1f} tok/s; "
        f"text {usage['completion_tokens']} tokens, {timings['decode_tok_s']:.1f} tok/s; "
        f"{generation.finish_reason}"
    )


def _report(
    llm: "LLM", generation: "Generation", model: str, cache: str, think: str | None
) -> dict[str, Any]:
    """The object of --json."""
    report: dict[str, Any] = {
        "text": generation.text,
        "tokens": generation.tokens,
        "finish_reason": generation.finish_reason,
        "usage": generation.usage,
        "timings": generation.timings,
        "model": model,
        "backend": llm.backend_name,
        "device": llm.device,
        "cache": cache,
    }
    placement = getattr(llm.runner.be, "placement", None)
    if placement is not None:
        report["experts"] = placement.report().fields()
    if think is not None:
        from ..chat import split_reasoning

        parts = split_reasoning(generation.text, think)
        report["reasoning"], report["content"] = parts
    if generation.logprobs is not None:
        report["logprobs"] = [
            _entry(llm, at.token, at.logprob)
            | {"top": [_entry(llm, token, logprob) for token, logprob in at.top]}
            for at in generation.logprobs
        ]
    return report


def _entry(llm: "LLM", token: int, logprob: float) -> dict[str, Any]:
    assert llm.tokenizer is not None  # the prompt was text
    return {"token": token, "text": llm.tokenizer.decode([token]), "logprob": logprob}
