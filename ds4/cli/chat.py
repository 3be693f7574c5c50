"""`ds4 chat`: a conversation, on a terminal or through a pipe."""

import sys
from collections.abc import Callable
from contextlib import closing
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from ..errors import Ds4Error, PromptError
from . import options
from .groups import grouped
from .terminal import Interrupt, Screen, console, decode, read_file, show_error

if TYPE_CHECKING:
    from ..llm import LLM, Generation

HELP = """\
/think [low|high|max]  think before answering; shown dim
/nothink               answer at once
/read FILE             send a file as the next message
/clear                 start a new conversation
/help                  this list
/quit                  leave, as Ctrl-D does
Ctrl-C ends an answer early; twice leaves. Alt-Enter starts a new line.
A message may begin with / after a space."""


@grouped
def chat(
    system: Annotated[
        str | None, typer.Option(help="Instructions for the whole talk.", show_default=False)
    ] = None,
    think: Annotated[
        Literal["off", "low", "high", "max"], typer.Option(help="How hard, before an answer.")
    ] = "off",
    *,
    place: options.Place,
    speculate: options.Speculate = "off",
    max_tokens: options.MaxAnswer = None,
    sampling: options.Sampling,
) -> None:
    """Talk with a model. /help lists what can be typed besides messages.

    Without a terminal each line of standard input is a message.
    """
    chosen = sampling.given(max_tokens=max_tokens)
    llm = options.load(place, speculate=speculate)
    if llm.chat is None:
        raise PromptError(f"{place.model} has no tokenizer.json, and a chat needs one")
    talk = Talk(llm, system, think, chosen)
    if sys.stdin.isatty() and sys.stdout.isatty():
        _converse(talk, _typed_lines())
    elif not _converse(talk, _piped_lines()):
        raise typer.Exit(1)


class Talk:
    """The messages so far, and what a line from the user does to them."""

    def __init__(
        self, llm: "LLM", system: str | None, think: str, sampling: dict[str, Any]
    ) -> None:
        self.llm, self.think, self.sampling = llm, think, sampling
        self._system = [{"role": "system", "content": system}] if system else []
        self.messages: list[dict[str, str]] = [*self._system]
        self._console = console(stderr=True)
        self._commands: dict[str, Callable[[str], None]] = {
            "/help": lambda _: self._say(HELP),
            "/think": self._set_thinking,
            "/nothink": lambda _: self._set_thinking("off"),
            "/read": lambda path: self.ask(read_file(path)),
            "/clear": self._clear,
        }

    def take(self, line: str) -> bool:
        """Obey a command or answer a message; False to quit. Raises Ds4Error, and goes on."""
        name, _, argument = line.strip().partition(" ")
        if not line.startswith("/"):
            if name:
                self.ask(line)
            return True
        if name in ("/quit", "/exit"):
            return False
        if name not in self._commands:
            raise PromptError(f"no command {name}: /help lists them")
        self._commands[name](argument.strip())
        return True

    def ask(self, text: str) -> None:
        """Answer one message. A message that can't be answered leaves no trace."""
        request = [*self.messages, {"role": "user", "content": text}]
        said, generation = self._show(
            self.llm.stream(request, thinking=self.think, **self.sampling)
        )
        self.messages = request + self._remembered(said)
        if generation is None:
            self._say("(stopped)")
        elif generation.finish_reason == "length":
            self._say(self._why_short(generation))

    def _show(self, stream: Any) -> tuple[str, "Generation | None"]:
        """Write an answer as it comes, until its end or Ctrl-C."""
        from ..chat import ReasoningSplitter

        screen, splitter = Screen(sys.stdout), ReasoningSplitter(self.think)
        said, generation = "", None
        with Interrupt() as interrupt, closing(stream):
            for piece in stream:
                thought, answer = splitter.push(piece.text)
                screen.thought(thought)
                screen.text(answer)
                said += piece.text
                generation = piece.generation
                if interrupt.hit:
                    break
        screen.thought(splitter.flush())
        screen.end()
        return said, generation

    def _remembered(self, said: str) -> list[dict[str, str]]:
        from ..chat import split_reasoning

        reasoning, content = split_reasoning(said, self.think)
        message = {"role": "assistant", "content": content}
        if reasoning:
            message["reasoning_content"] = reasoning
        return [message] if said else []

    def _why_short(self, generation: "Generation") -> str:
        if generation.usage["total_tokens"] >= self.llm.context:
            return f"(the context of {self.llm.context} tokens is full: /clear starts anew)"
        return f"(stopped after {generation.usage['completion_tokens']} tokens: --max-tokens)"

    def _set_thinking(self, mode: str) -> None:
        if mode not in ("", "off", "low", "high", "max"):
            raise PromptError(f"/think takes low, high or max, not {mode}")
        self.think = mode or "high"
        self._say(f"(thinking: {self.think})")

    def _clear(self, _: str) -> None:
        self.messages = [*self._system]
        self._say("(a new conversation)")

    def _say(self, text: str) -> None:
        self._console.print(text, style="dim", markup=False, soft_wrap=True)


def _converse(talk: Talk, next_line: Callable[[], str]) -> bool:
    """Until the user leaves; whether everything went well."""
    well = True
    while True:
        try:
            if not talk.take(next_line()):
                return well
        except EOFError:
            return well
        except Ds4Error as error:
            show_error(error)
            well = False


def _piped_lines() -> Callable[[], str]:
    """Lines of standard input, without any prompt. EOFError at its end."""
    count = 0

    def next_line() -> str:
        nonlocal count
        raw = sys.stdin.buffer.readline()
        count += 1
        if not raw:
            raise EOFError
        return decode(raw, f"line {count} of standard input").rstrip("\r\n")

    return next_line


def _typed_lines() -> Callable[[], str]:
    """Lines typed at a prompt. Ctrl-C drops the line, Ctrl-D raises EOFError."""
    from prompt_toolkit import PromptSession
    from prompt_toolkit.key_binding import KeyBindings

    keys = KeyBindings()
    keys.add("escape", "enter")(lambda event: event.current_buffer.insert_text("\n"))
    session: PromptSession[str] = PromptSession(key_bindings=keys)

    def next_line() -> str:
        while True:
            try:
                return session.prompt("> ")
            except KeyboardInterrupt:
                console(stderr=True).print("(/quit or Ctrl-D leaves)", style="dim")

    return next_line
