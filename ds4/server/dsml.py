"""Tool calls as the model writes them, made fit to be read: DSML whose values are valid.

The parser behind this takes `string="false">two` for the JSON value two, and leaves a call that was
cut off open. Here such a value becomes a string, names lose what would break JSON, and `close`
ends what is open. A string passes as it comes; a JSON value is held until it is whole.
"""

import json
import re

from .grammar import DSML

END_PARAMETER = f"</{DSML}parameter>"
END_INVOKE = f"</{DSML}invoke>"
END_CALLS = f"</{DSML}tool_calls>"
_TAG = re.compile(rf'<{DSML}parameter\s+name="(.*?)"(?:\s+string="(true|false)")?\s*>', re.DOTALL)


class DsmlRepair:
    """Text in, as it was sampled after the "<" of the first tag; repaired text out.

    parallel  without it the block ends after the first call
    """

    def __init__(self, parallel: bool = True) -> None:
        self._parallel = parallel
        self._opened = False
        self._held = "<"
        self._value: str | None = None  # "true" or "false" while inside a parameter
        self._name = ""
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
        if self._value == "true":
            text = self._before_partial(END_PARAMETER)[0] + END_PARAMETER + "\n"
        self._held, self._value = "", None
        if self._in_call:
            text += END_INVOKE + "\n"
        self._in_call = False
        return text

    def _next(self) -> str | None:
        if self._value == "true":
            return self._string()
        if self._value == "false":
            return self._json()
        return self._between()

    def _between(self) -> str | None:
        """Up to the end of the next tag; None if that has not come yet."""
        start = self._held.find("<")
        end = self._held.find(">", start)
        if start < 0 or end < 0:
            return None
        tag = self._held[start : end + 1]
        if tag.startswith(f"<{DSML}parameter"):
            return self._parameter(start)
        before, self._held = self._held[:start], self._held[end + 1 :]
        if tag.startswith(f"<{DSML}invoke"):
            if self._called and not self._parallel:
                self.ended = self.cut = True
                return before + END_CALLS
            self._in_call = self._called = True
        elif tag == END_INVOKE:
            self._in_call = False
        self.ended = tag == END_CALLS
        return before + tag

    def _parameter(self, start: int) -> str | None:
        """A parameter's opening tag; that of a JSON value is kept back with the value."""
        found = _TAG.match(self._held, start)
        if found is None:  # perhaps the ">" was in the name
            return self._drop(start) if END_PARAMETER in self._held else None
        before, self._held = self._held[:start], self._held[found.end() :]
        self._name = json.dumps(found[1], ensure_ascii=False)[1:-1]
        self._value = found[2] or "true"
        return before + (_opening(self._name, "true") if self._value == "true" else "")

    def _drop(self, start: int) -> str:
        before, _, self._held = self._held.partition(END_PARAMETER)
        return before[:start]

    def _string(self) -> str | None:
        end = self._held.find(END_PARAMETER)
        if end < 0:
            text, self._held = self._before_partial(END_PARAMETER)
            return text or None
        end += len(END_PARAMETER)
        text, self._held, self._value = self._held[:end], self._held[end:], None
        return text

    def _json(self) -> str | None:
        end = self._held.find(END_PARAMETER)
        if end < 0:
            return None
        value, self._held = self._held[:end], self._held[end + len(END_PARAMETER) :]
        self._value = None
        kind = "false" if _is_json(value) else "true"
        return _opening(self._name, kind) + value + END_PARAMETER

    def _before_partial(self, tag: str) -> tuple[str, str]:
        """The held text, and an end of it with which `tag` may begin."""
        for n in range(min(len(tag) - 1, len(self._held)), 0, -1):
            if tag.startswith(self._held[-n:]):
                return self._held[:-n], self._held[-n:]
        return self._held, ""


def _opening(name: str, string: str) -> str:
    return f'<{DSML}parameter name="{name}" string="{string}">'


def _is_json(text: str) -> bool:
    def refuse(constant: str) -> None:
        raise ValueError(constant)

    try:
        json.loads(text, parse_constant=refuse)  # NaN and Infinity are Python's, not JSON's
    except (ValueError, RecursionError):
        return False
    return True
