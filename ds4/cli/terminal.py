"""What people see: progress, dim asides, text that is safe to show, Ctrl-C."""

import io
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import TYPE_CHECKING, TextIO

from ..errors import PromptError

if TYPE_CHECKING:
    from rich.console import Console

PATIENCE = 0.5  # seconds before a progress bar is worth its flicker

# A model's text must not move the cursor, retitle the window or answer for the keyboard.
_CONTROL = [*range(9), *range(11, 32), *range(127, 160)]
_SHOWN = dict.fromkeys(_CONTROL, "\N{REPLACEMENT CHARACTER}")


def console(stderr: bool = False) -> "Console":
    """A rich console without any styling where NO_COLOR asks for that."""
    from rich.console import Console

    plain = bool(os.environ.get("NO_COLOR"))
    return Console(stderr=stderr, color_system=None if plain else "auto", highlight=False)


def show_error(error: Exception) -> None:
    """One line on standard error."""
    print("error: " + " ".join(str(error).split()), file=sys.stderr)


def open_streams() -> None:
    """Standard streams that were closed before the start read nothing and lead nowhere.

    Standard output takes any text: what its encoding lacks is a question mark.
    """
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode))  # noqa: SIM115  # for the whole process
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")


def drop_output() -> None:
    """What standard output could not take must not be tried again, and complained of, at exit."""
    with suppress(OSError, ValueError):  # not a file
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


class Screen:
    """Writes a model's text as it comes; what it thinks is dim, and only on a terminal."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._terminal = stream.isatty()
        styled = self._terminal and not os.environ.get("NO_COLOR")
        self._dim, self._plain = ("\x1b[2m", "\x1b[0m") if styled else ("", "")
        self._thinking = False
        self._last = ""

    def text(self, text: str) -> None:
        """Show a part of the answer."""
        if text and self._thinking:
            self._thinking = False
            text = "\n\n" + text.lstrip("\n")
        self._write(text)

    def thought(self, text: str) -> None:
        """Show a part of the reasoning."""
        if text and self._terminal:
            self._thinking = True
            self._write(text, self._dim, self._plain)

    def end(self) -> None:
        """Finish the line."""
        if self._last != "\n":
            self._write("\n")

    def _write(self, text: str, before: str = "", after: str = "") -> None:
        if not text:
            return
        self._last = text[-1]
        self._stream.write(before + (text.translate(_SHOWN) if self._terminal else text) + after)
        self._stream.flush()


class Interrupt:
    """In its block Ctrl-C sets `hit`, for work to end where it can go on; the second one raises."""

    def __enter__(self) -> "Interrupt":
        self.hit = False
        self._before = signal.signal(signal.SIGINT, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        signal.signal(signal.SIGINT, self._before)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.hit:
            raise KeyboardInterrupt
        self.hit = True


@contextmanager
def loading_bar(label: str = "loading") -> Iterator[Callable[[int, int], None] | None]:
    """A progress callback (bytes done, bytes in all), or None where nobody watches."""
    if not sys.stderr.isatty():
        yield None
        return
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

    columns = TextColumn(label), BarColumn(), DownloadColumn(), TimeRemainingColumn()
    bar = Progress(*columns, console=console(stderr=True), transient=True)
    task = bar.add_task(label)
    start = time.monotonic()

    def report(done: int, total: int) -> None:
        if time.monotonic() - start > PATIENCE:
            bar.start()
        bar.update(task, completed=done, total=total)

    try:
        yield report
    finally:
        bar.stop()


def decode(raw: bytes, source: str) -> str:
    """UTF-8 text of a file or pipe. Raises PromptError, which says where it is not."""
    try:
        return raw.decode()
    except UnicodeDecodeError as error:
        wrong = f"byte {error.start} (0x{raw[error.start]:02x})"
        raise PromptError(f"{source} is not UTF-8 text: see {wrong}") from error


def read_file(path: str | os.PathLike[str]) -> str:
    """A text file, without its last line end. Raises PromptError."""
    try:
        with open(path, "rb") as file:
            raw = file.read()
    except OSError as error:
        raise PromptError(f"{os.fspath(path)}: cannot be read: {error.strerror}") from error
    return decode(raw, os.fspath(path)).removesuffix("\n")
