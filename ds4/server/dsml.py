"""Tool calls as the model writes them, made fit to be read: DSML whose values are valid.

The parser behind this takes `string="false">two` for the JSON value two, and leaves a call that was
cut off open. Here such a value becomes a string, names lose what would break JSON, and `close`
ends what is open. Where a tool's schema says string or says anything but string, a value that was
marked the other way is marked as the schema wants it. A string passes as it comes; what may be a
JSON value is held until it is whole.
"""

import json
import re
from collections.abc import Callable

from .grammar import DSML

Takes = Callable[[str, str], tuple[bool, bool]]
"""By a tool's and a parameter's name: whether it takes strings, and whether other values."""

END_PARAMETER = f"</{DSML}parameter>"
END_INVOKE = f"</{DSML}invoke>"
END_CALLS = f"</{DSML}tool_calls>"
_TAG = re.compile(rf'<{DSML}parameter\s+name="(.*?)"(?:\s+string="(true|false)")?\s*>', re.DOTALL)
_ANY = re.compile(f"</?{DSML}")
_INVOKE = re.compile(rf'<{DSML}invoke\s+name="([^"]*)"\s*>')


class DsmlRepair:
    """Text in, as it was sampled after the "<" of the first tag; repaired text out.

    parallel  without it the block ends after the first call
    takes     what the tools' schemas say of their parameters
    """

    def __init__(
        self, parallel: bool = True, takes: Takes = lambda tool, name: (True, True)
    ) -> None:
        self._parallel, self._takes = parallel, takes
        self._opened = False
        self._held, self._scanned = "<", 0  # so much of a value is known to hold no tag
        self._value: str | None = None  # inside a parameter: "text" that passes, or "held"
        self._tool = self._name = ""
        self._string = True  # how the value was marked
        self._allowed = True, True
        self._in_call = self._called = False
        self.ended = False  # the block is complete
        self.cut = False  # because a second call began that was not to come

    def push(self, text: str) -> str:
        """What is now certain."""
        self._held += text
        done: list[str] = []
        while not self.ended and (more := self._next()) is not None:
            if not self._opened:  # whoever sent us the text has passed on the "<"
                self._opened, more = True, more[1:]
            done.append(more)
        return "".join(done)

    def close(self) -> str:
        """The end of a call that was cut off: what is whole of it counts."""
        text = "" if self._opened else self._held[1:]
        if self._value == "text":
            text = self._value_so_far()[0] + END_PARAMETER + "\n"
        self._held, self._value = "", None
        return text + self._end_invoke()

    def _next(self) -> str | None:
        if self._value == "text":
            return self._text()
        if self._value == "held":
            return self._whole_value()
        return self._between()

    def _between(self) -> str | None:
        """The next tag, with the space before it; None if it has not come yet.

        What else stands between tags is left out.
        """
        end = self._held.find(">")
        start = max(self._held.rfind(opening, 0, end) for opening in (f"<{DSML}", f"</{DSML}"))
        if end < 0:
            return None
        if start < 0:
            self._held = self._held[end + 1 :]
            return ""
        if self._held.startswith(f"<{DSML}parameter", start):
            return self._parameter(start)
        space, tag = _space(self._held[:start]), self._held[start : end + 1]
        self._held = self._held[end + 1 :]
        if not self._opened:
            return tag
        if invoke := _INVOKE.fullmatch(tag):
            self._tool = invoke[1]
            if self._called and not self._parallel:
                self.ended = self.cut = True
                return space + END_CALLS
            again = END_INVOKE + "\n" if self._in_call else ""
            self._in_call = self._called = True
            return space + again + tag
        if tag == END_INVOKE and self._in_call:
            self._in_call = False
            return space + tag
        if tag == END_CALLS:
            self.ended = True
            return space + self._end_invoke() + tag
        return space

    def _end_invoke(self) -> str:
        was, self._in_call = self._in_call, False
        return END_INVOKE + "\n" if was else ""

    def _parameter(self, start: int) -> str | None:
        """A parameter's opening tag; that of a value that is held is held with it."""
        found = _TAG.match(self._held, start)
        ends = self._held.find(END_PARAMETER, start)
        if found is None or not self._in_call:  # perhaps the ">" was in the name
            if ends < 0:
                return None
            space, self._held = _space(self._held[:start]), self._held[ends + len(END_PARAMETER) :]
            return space
        space, self._held = _space(self._held[:start]), self._held[found.end() :]
        self._name = json.dumps(found[1], ensure_ascii=False)[1:-1]
        self._string = found[2] != "false"
        self._allowed = self._takes(self._tool, found[1])
        self._value = "text" if self._string and self._allowed[0] else "held"
        return space + (_opening(self._name, "true") if self._value == "text" else "")

    def _text(self) -> str | None:
        text, ended = self._value_so_far()
        if ended:
            self._value = None
            return text + END_PARAMETER
        self._held, self._scanned = self._held[len(text) :], 0
        return text or None

    def _whole_value(self) -> str | None:
        value, ended = self._value_so_far()
        if not ended:
            return None
        self._value = None
        return _opening(self._name, self._kind(value)) + value + END_PARAMETER

    def _kind(self, value: str) -> str:
        """How a value is to be marked: "true" for a string."""
        text, other = self._allowed
        if not _is_json(value):
            return "true"
        if text and not other:
            return "false" if value.lstrip().startswith('"') else "true"
        return "true" if self._string and text else "false"

    def _value_so_far(self) -> tuple[str, bool]:
        """A value as far as it is certain, and whether it has ended: then its end is taken.

        Any tag ends a value, for a parser would not look at it as a part of one.
        """
        found = _ANY.search(self._held, self._scanned)
        if found is None:
            certain = len(self._held) - _open(self._held)
            self._scanned = certain
            return self._held[:certain], False
        self._scanned = 0
        value, rest = self._held[: found.start()], self._held[found.start() :]
        if rest.startswith(END_PARAMETER):
            self._held = rest[len(END_PARAMETER) :]
            return value, True
        if END_PARAMETER.startswith(rest):
            return value, False
        self._held = rest
        return value, True


def _opening(name: str, string: str) -> str:
    return f'<{DSML}parameter name="{name}" string="{string}">'


def _open(text: str) -> int:
    """The length of the longest end of `text` with which a tag may begin."""
    tags = f"<{DSML}", f"</{DSML}"
    for n in range(min(len(tags[1]) - 1, len(text)), 0, -1):
        if any(tag.startswith(text[-n:]) for tag in tags):
            return n
    return 0


def _space(text: str) -> str:
    return "".join(filter(str.isspace, text))


def _is_json(text: str) -> bool:
    def refuse(constant: str) -> None:
        raise ValueError(constant)

    try:
        json.loads(text, parse_constant=refuse)  # NaN and Infinity are Python's, not JSON's
    except (ValueError, RecursionError):
        return False
    return True
