"""JSON files, and typed access to a parsed object: errors name the file, the field and the need."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

from .errors import ConfigError, Ds4Error

LARGEST = 2**31 - 1
AGAIN = "download it again"


def read_json(path: Path, kind: type[Ds4Error], remedy: str) -> Any:
    """The value that a JSON file holds. Raises `kind` with the file and the remedy."""
    try:
        return json.loads(path.read_text("utf-8"))
    except OSError as error:
        raise kind(f"{path}: cannot be read: {error.strerror}; {remedy}") from error
    except (ValueError, RecursionError) as error:
        raise kind(f"{path}: is not valid JSON: {error}; {remedy}") from error


def need_regular(path: Path, kind: type[Ds4Error], remedy: str) -> None:
    """Refuse what is there but no regular file: opening a pipe would wait for a writer."""
    try:
        irregular = path.exists() and not path.is_file()
    except OSError as error:
        raise kind(f"{path}: cannot be read: {error.strerror}; {remedy}") from error
    if irregular:
        raise kind(f"{path}: is no regular file; {remedy}")


class Fields:
    """Typed access to a parsed config.json; each failure names the file, the field and the need."""

    def __init__(self, values: Mapping[str, Any], source: str) -> None:
        self.values, self.source = values, source

    def get(self, name: str) -> Any:
        return self.values.get(name)

    def fail(self, name: str, need: str) -> NoReturn:
        if name in self.values:
            self.refuse(name, self.values[name], need)
        raise ConfigError(
            f"{self.source}: {name} is missing; it should be {need} (download config.json again)"
        )

    def refuse(self, name: str, value: Any, need: str) -> NoReturn:
        raise ConfigError(f"{self.source}: {name} is {short(value)}; it should be {need}")

    def integer(self, name: str, least: int = 1, most: int = LARGEST) -> int:
        value = self.get(name)
        if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
            limit = f"of at least {least}" if most == LARGEST else f"from {least} to {most}"
            self.fail(name, f"an integer {limit}")
        return value

    def optional_integer(self, name: str) -> int:
        return self.integer(name, 0) if name in self.values else 0

    def number(self, name: str, above: float = 0.0) -> float:
        value = self.get(name)
        if (
            isinstance(value, bool)
            or not isinstance(value, int | float)
            or not above < value < 1e30
        ):
            self.fail(name, f"a finite number above {above:g}")
        return float(value)

    def fixed(self, known: Mapping[str, Any]) -> None:
        """Fields that may be left out, but have only one value that this runtime supports."""
        for name, value in known.items():
            if name in self.values and self.values[name] != value:
                self.fail(name, f"{json.dumps(value)}, the only value supported")

    def inside(self, name: str) -> "Fields":
        value = self.get(name)
        if not isinstance(value, Mapping):
            self.fail(name, "an object")
        return Fields(value, f"{self.source}: {name}")

    def types(self, name: str, layers: int, known: tuple[str, ...]) -> list[str] | None:
        """transformers' list of layer kinds, one a layer; None where the config has none."""
        kinds = self.get(name)
        if kinds is None:
            return None
        if not isinstance(kinds, list | tuple) or len(kinds) != layers:
            self.fail(name, f"a list of {layers} kinds, one a layer (num_hidden_layers)")
        for i, kind in enumerate(kinds):
            if kind not in known:
                self.refuse(f"{name}[{i}]", kind, "one of " + ", ".join(known))
        return list(kinds)

    def agree(self, name: str, value: Any, other: str) -> None:
        """Refuse a field that contradicts `value`, which another field says."""
        if self.get(name) not in (None, value):
            self.fail(name, f"{short(value)}, to agree with {other}")


def short(value: Any) -> str:
    """A value for a one-line message."""
    text = json.dumps(value, default=str)
    return text if len(text) <= 60 else text[:57] + "..."
