"""Coding agents as they are installed, each with one task, over the tests' fake engine.

    npm install @anthropic-ai/claude-code @openai/codex opencode-ai      # in FOLDER
    python -m bench.agent_clis FOLDER [--record tests/agents]

The engine's answers are scripted: a thought and a call of one of the agent's own tools, then a last
word. Checked: the agent ends well and prints that word, every request was answered, and the prompt
of the second turn begins with the first one's and exactly what was sampled. With --record the
requests' bodies are written, longer texts in them replaced by a note of their length.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ds4.loader import find_model
from ds4.server.app import create_app
from ds4.server.client import ModelInfo
from ds4.server.clients import CLIENTS, Endpoint
from ds4.server.local import LocalClient
from ds4.server.served import ServedModel
from tests.fake_engine import FakeEngine, demo_tokenizer
from tests.serving import MODEL, listening
from tests.test_server_agents import Script, block

CONTEXT = 400_000
SECONDS = 300
TASK = "Fix area() in area.py"
WORD = "Done: area() multiplies."
KEPT = 40  # characters of a text that a recording keeps
KEPT_WHOLE = "$schema", "pattern", "enum"
FILE = "def area(w, h):\n    return w + h\n"


@dataclass(frozen=True)
class Agent:
    """How to start one on a task, and the call that the model makes; it may ask for a title."""

    client: str
    command: tuple[str, ...]
    tool: str
    argument: str
    value: str
    package: str


AGENTS = {
    "claude_code": Agent(
        "claude",
        ("claude", "--settings", "{home}/.claude/ds4.json", "-p", TASK, "--allowedTools", "Read"),
        *("Read", "file_path", "{work}/area.py", "@anthropic-ai/claude-code"),
    ),
    "codex": Agent(
        "codex",
        ("codex", "exec", "--profile", "ds4", "--skip-git-repo-check", TASK),
        *("exec_command", "cmd", "cat area.py", "@openai/codex"),
    ),
    "opencode": Agent(
        "opencode",
        ("opencode", "run", "--model", f"ds4/{MODEL}", TASK),
        *("read", "filePath", "{work}/area.py", "opencode-ai"),
    ),
}


def main() -> None:
    parser = argparse.ArgumentParser(description="coding agents over the fake engine")
    parser.add_argument("folder", type=Path, help="where they were installed with npm")
    parser.add_argument("--record", type=Path, help="a folder for what they sent")
    args = parser.parse_args()
    failed = 0
    for name, agent in AGENTS.items():
        with tempfile.TemporaryDirectory() as folder:
            try:
                said, bodies = drive(agent, args.folder.resolve(), Path(folder))
            except AssertionError as error:
                print(f"{name}: FAILED: {error}")
                failed = 1
                continue
        print(f"{name} {said}")
        if args.record:
            text = json.dumps([shortened(body) for body in bodies], ensure_ascii=False)
            (args.record / f"recorded_{name}.json").write_text(text + "\n")
    sys.exit(failed)


def drive(agent: Agent, installed: Path, folder: Path) -> tuple[str, list[Any]]:
    """What is to be told of it, and the bodies that it sent."""
    home, work = folder / "home", folder / "work"
    work.mkdir()
    (work / "area.py").write_text(FILE)
    value = agent.value.format(work=work)
    call = "Let me see.</think>" + block((agent.tool, {agent.argument: value}))
    script = Script()

    def reply(request: Any) -> Any:
        """A request without tools is for a title, and no turn."""
        turn = len(request.prompt) > 2000
        if not turn:
            return "Area"
        script.answers.append((call, f"Fixed.</think>{WORD}")[len(script.given) > 0])
        return script(request)

    tokenizer = demo_tokenizer()
    engine = FakeEngine(tokenizer, reply, context=CONTEXT)
    client = LocalClient(engine, ModelInfo(MODEL, tokenizer.size), CONTEXT)
    recorder = Recorder(create_app([ServedModel.from_folder(client, find_model("demo"))]))
    with listening(recorder) as url:
        CLIENTS[agent.client](Endpoint(url, {MODEL: CONTEXT}), home).write()
        binary = installed / "node_modules" / ".bin" / agent.command[0]
        options = [part.format(home=home) for part in agent.command[1:]]
        run = [str(binary), *options]
        environment = os.environ | {"HOME": str(home), "PWD": str(work), "DS4_API_KEY": "none"}
        done = subprocess.run(
            run,
            cwd=work,
            env=environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=SECONDS,
            check=False,
        )
    client.close()
    assert done.returncode == 0, f"status {done.returncode}: {done.stderr[-2000:]}"
    assert WORD in done.stdout, f"it printed {done.stdout[-2000:]!r}"
    bad = [status for _, status in recorder.seen if status != 200]
    assert not bad, f"answers with status {bad}"
    assert len(script.given) == 2, f"{len(script.given)} turns"
    script.assert_prefixes()
    package = installed / "node_modules" / agent.package / "package.json"
    version = json.loads(package.read_text())["version"]
    prompts = ", ".join(str(len(prompt)) for prompt in script.prompts)
    bodies = [body for body, _ in recorder.seen]
    return f"{version}: {len(bodies)} requests, turns of {prompts} tokens", bodies


class Recorder:
    """An application whose POST bodies are kept, with the status of each answer."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app
        self.seen: list[tuple[Any, int]] = []

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        text = b""

        async def heard() -> Message:
            nonlocal text
            message = await receive()
            text += message.get("body", b"")
            return message

        async def told(message: Message) -> None:
            if message["type"] == "http.response.start" and scope["method"] == "POST":
                self.seen.append((json.loads(text), message["status"]))
            await send(message)

        await self._app(scope, heard, told)


def shortened(value: Any) -> Any:
    """A body whose form is whole: longer texts are replaced, descriptions left out."""
    if isinstance(value, dict):
        return {
            name: "described"
            if name == "description" and isinstance(part, str)
            else part
            if name in KEPT_WHOLE
            else shortened(part)
            for name, part in value.items()
        }
    if isinstance(value, list):
        return [shortened(part) for part in value]
    if isinstance(value, str) and len(value) > KEPT:
        return f"a text of {len(value)} characters"
    return value


if __name__ == "__main__":
    main()
