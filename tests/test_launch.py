"""`ds4 launch`: what agents are told, and that nothing else of their files is touched."""

import json
import tomllib
from pathlib import Path

import pytest

from ds4.cli import app
from ds4.server.clients import CLIENTS, Endpoint, LaunchError, ask

from .server_process import ServerProcess

SERVER = Endpoint("http://127.0.0.1:8000", {"flash": 131_072, "small": 4096})


@pytest.mark.parametrize("name", CLIENTS)
def test_files_are_written_and_written_again(name: str, tmp_path: Path) -> None:
    setup = CLIENTS[name](SERVER, tmp_path)
    setup.write()
    first = setup.file.read_text()
    setup.write()
    assert setup.file.read_text() == first == setup.shown()
    told = tomllib.loads(first) if name == "codex" else json.loads(first)
    assert "127.0.0.1:8000" in json.dumps(told)
    assert "flash" in json.dumps(told)
    assert list(setup.file.parent.iterdir()) == [setup.file]


@pytest.mark.parametrize("name", ["opencode", "pi"])
def test_what_a_file_has_stays(name: str, tmp_path: Path) -> None:
    setup = CLIENTS[name](SERVER, tmp_path)
    kind = "provider" if name == "opencode" else "providers"
    setup.file.parent.mkdir(parents=True)
    setup.file.write_text(json.dumps({"theme": "x", kind: {"other": {"a": 1}, "ds4": {"old": 1}}}))
    setup.write()
    held = json.loads(setup.file.read_text())
    assert held["theme"] == "x"
    assert held[kind]["other"] == {"a": 1}
    assert "old" not in held[kind]["ds4"]
    for text in ("{", "[]", "// a comment\n{}"):
        setup.file.write_text(text)
        with pytest.raises(LaunchError, match="by hand"):
            setup.write()
        assert setup.file.read_text() == text


def test_a_running_server_is_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    key = "k" * 32
    (tmp_path / "keys").write_text(key)
    monkeypatch.setenv("HOME", str(tmp_path))
    with ServerProcess(keys=str(tmp_path / "keys")) as server:
        url = f"http://127.0.0.1:{server.port}"
        with pytest.raises(LaunchError, match="401: set DS4_API_KEY"):
            ask(url, None)
        monkeypatch.setenv("DS4_API_KEY", key)
        app(["launch", "codex", "--url", url, "--write"], standalone_mode=False)
    told = tomllib.loads((tmp_path / ".codex" / "ds4.config.toml").read_text())
    assert told["model"] == "fake"
    assert told["model_context_window"] == 4096
    assert key not in str(told)
    assert "codex --profile ds4" in capsys.readouterr().out
    with pytest.raises(LaunchError, match="ds4 serve"):
        ask(url, None)
    with pytest.raises(LaunchError, match="no address"):
        ask("file:///etc/passwd", None)
