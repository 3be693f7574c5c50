"""What coding agents want to be told about a server: a file of theirs, and a command to start."""

import json
import os
import tempfile
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import Ds4Error
from ..json_fields import read_json

KEY = "DS4_API_KEY"  # the variable that holds the key, here and there
ANSWER = 32_768  # tokens that a client may ask for at once


class LaunchError(Ds4Error):
    """The server does not answer, or a client's file cannot be changed."""


@dataclass(frozen=True)
class Endpoint:
    """A server as a client sees it."""

    url: str
    models: Mapping[str, int]  # name -> tokens of context

    @property
    def first(self) -> str:
        return next(iter(self.models))

    def answer(self, model: str) -> int:
        return min(ANSWER, self.models[model] // 2)


def ask(url: str, key: str | None) -> Endpoint:
    """What the server at `url` has. Raises LaunchError with the remedy."""
    url = url.rstrip("/")
    if not url.startswith(("http://", "https://")):
        raise LaunchError(f"{url} is no address: give one such as http://127.0.0.1:8000")
    request = urllib.request.Request(f"{url}/v1/models")
    if key:
        request.add_header("x-api-key", key)
    try:
        with urllib.request.urlopen(request, timeout=10) as answer:
            listed = json.load(answer)["data"]
        return Endpoint(url, {each["id"]: int(each["max_model_len"]) for each in listed})
    except urllib.error.HTTPError as error:
        hint = f": set {KEY}" if error.code == 401 else ""
        raise LaunchError(f"{url} answered {error.code}{hint}") from error
    except (OSError, ValueError, RecursionError, KeyError, TypeError, AttributeError) as error:
        why = getattr(error, "reason", error)  # of urllib's, the one below it
        raise LaunchError(f"no ds4 at {url} ({why}): start one with `ds4 serve`") from error


@dataclass(frozen=True)
class Setup:
    """A client's file, what belongs into it, and how to start the client with it.

    Where `text` is an object, it is merged into what the file has; else it is the whole file, one
    that only ds4 writes.
    """

    file: Path
    text: str | dict[str, Any]
    command: str

    def shown(self) -> str:
        return self.text if isinstance(self.text, str) else json.dumps(self.text, indent=2) + "\n"

    def write(self) -> None:
        """Atomically; other entries of the file stay as they are. Raises LaunchError."""
        text = self.shown()
        if isinstance(self.text, dict) and self.file.exists():
            text = json.dumps(_merged(self._held(), self.text), indent=2) + "\n"
        try:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            target = self.file.resolve()  # a link stays one
            fd, name = tempfile.mkstemp(dir=target.parent, prefix=target.name)
            with open(fd, "w", encoding="utf-8") as made:
                made.write(text)
                made.flush()
                os.fsync(made.fileno())
            os.replace(name, target)
        except OSError as error:
            raise LaunchError(f"{self.file}: cannot be written: {error.strerror}") from error

    def _held(self) -> dict[str, Any]:
        held = read_json(self.file, LaunchError, "add what is shown by hand")
        if not isinstance(held, dict):
            raise LaunchError(f"{self.file}: is no JSON object: add what is shown by hand")
        return held


def _merged(held: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    """`new` over `held`, two objects deep: a provider of ours replaces the one before whole."""
    return {
        **held,
        **{
            name: {**held[name], **value} if isinstance(held.get(name), dict) else value
            for name, value in new.items()
            if isinstance(value, dict)
        },
        **{name: value for name, value in new.items() if not isinstance(value, dict)},
    }


def claude(server: Endpoint, home: Path) -> Setup:
    """Claude Code: a settings file of its own, so that the usual ones stay untouched."""
    file, model = home / ".claude" / "ds4.json", server.first
    names = ("MODEL", "DEFAULT_OPUS_MODEL", "DEFAULT_SONNET_MODEL", "DEFAULT_HAIKU_MODEL")
    text = {
        "apiKeyHelper": f"printenv {KEY} || echo none",
        "env": {
            "ANTHROPIC_BASE_URL": server.url,
            **{f"ANTHROPIC_{name}": model for name in names},
            "CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC": "1",
            "CLAUDE_CODE_MAX_OUTPUT_TOKENS": str(server.answer(model)),
            "API_TIMEOUT_MS": "3600000",
        },
    }
    return Setup(file, json.dumps(text, indent=2) + "\n", f"claude --settings {file}")


def codex(server: Endpoint, home: Path) -> Setup:
    """Codex: a profile in a file of its own (Codex 0.134 and later)."""
    lines = [
        f"model = {json.dumps(server.first)}",
        'model_provider = "ds4"',
        f"model_context_window = {server.models[server.first]}",
        "",
        "[model_providers.ds4]",
        'name = "ds4"',
        f"base_url = {json.dumps(server.url + '/v1')}",
        'wire_api = "responses"',
        f'env_key = "{KEY}"',
        "stream_idle_timeout_ms = 3600000",
        "",
    ]
    command = f'{KEY}="${{{KEY}:-none}}" codex --profile ds4'
    return Setup(home / ".codex" / "ds4.config.toml", "\n".join(lines), command)


def opencode(server: Endpoint, home: Path) -> Setup:
    """opencode: a provider in its global file."""
    models = {
        name: {"name": name, "limit": {"context": context, "output": server.answer(name)}}
        for name, context in server.models.items()
    }
    provider = {
        "npm": "@ai-sdk/openai-compatible",
        "name": "ds4",
        "options": {"baseURL": f"{server.url}/v1", "apiKey": f"{{env:{KEY}}}"},
        "models": models,
    }
    text = {"$schema": "https://opencode.ai/config.json", "provider": {"ds4": provider}}
    file = home / ".config" / "opencode" / "opencode.json"
    return Setup(file, text, f"opencode --model ds4/{server.first}")


def pi(server: Endpoint, home: Path) -> Setup:
    """pi: a provider among its own models."""
    nothing = {"input": 0, "output": 0, "cacheRead": 0, "cacheWrite": 0}
    models = [
        {
            "id": name,
            "name": name,
            "reasoning": True,
            "input": ["text"],
            "cost": nothing,
            "contextWindow": context,
            "maxTokens": server.answer(name),
        }
        for name, context in server.models.items()
    ]
    provider = {
        "baseUrl": f"{server.url}/v1",
        "api": "openai-completions",
        "apiKey": KEY,
        "models": models,
    }
    file = home / ".pi" / "agent" / "models.json"
    return Setup(
        file, {"providers": {"ds4": provider}}, f"pi --provider ds4 --model {server.first}"
    )


CLIENTS: dict[str, Callable[[Endpoint, Path], Setup]] = {
    "claude": claude,
    "codex": codex,
    "opencode": opencode,
    "pi": pi,
}
