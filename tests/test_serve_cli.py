"""`ds4 serve`: from options and a file to settings, and what is refused before any loading."""

import sys
from pathlib import Path

import pytest

from ds4.cli import main
from ds4.server import assembly
from ds4.server.settings import ModelSettings, Settings


@pytest.fixture(autouse=True)
def _no_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DS4_API_KEY", raising=False)
    monkeypatch.setattr("ds4.server.access.set_up_logging", lambda level: None)


def settings_of(monkeypatch: pytest.MonkeyPatch, *options: str) -> Settings:
    taken: list[Settings] = []
    monkeypatch.setattr(assembly, "serve", taken.append)
    monkeypatch.setattr(sys, "argv", ["ds4", "serve", *options])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 0
    return taken[0]


def test_options_win_over_the_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert settings_of(monkeypatch) == Settings()
    file = tmp_path / "ds4.toml"
    file.write_text("port = 1\nqueue = 7\n[[models]]\nslots = 3\ncontext = 100\n")
    monkeypatch.setenv("DS4_PORT", "2")
    got = settings_of(
        monkeypatch, "-c", str(file), "--slots", "5", "--allow-host", "a", "--drain", "9"
    )
    assert (got.port, got.queue, got.hosts, got.drain_s) == (2, 7, ("a",), 9.0)
    assert got.models == (ModelSettings(slots=5, context=100),)
    made = settings_of(
        monkeypatch, "--synthetic", "flash", "--unique-layers", "7", "--recipe", "q2"
    )
    assert made.models == (
        ModelSettings(synthetic=True, model="flash", unique_layers=7, recipe="q2"),
    )


@pytest.mark.parametrize(
    ("options", "status", "match"),
    [
        (["--host", "0.0.0.0", "--port", "0"], 1, "there is no API key"),
        (["--model", "nowhere"], 1, "no model is called 'nowhere'"),
        (["--config", "absent.toml"], 1, "absent.toml: cannot be read"),
        (["--api-key-file", "absent"], 1, "absent: the API keys cannot be read"),
        (["--power", "windmill", "--port", "0"], 1, "no source of power is called 'windmill'"),
        (["--slots", "0"], 2, "slots"),
    ],
)
def test_what_is_refused(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    options: list[str],
    status: int,
    match: str,
) -> None:
    monkeypatch.setattr(sys, "argv", ["ds4", "serve", *options])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == status
    assert match in capsys.readouterr().err


def test_several_models_are_changed_in_the_file_only(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    file = tmp_path / "two.toml"
    file.write_text('[[models]]\nname = "a"\n[[models]]\nname = "a"\n')
    monkeypatch.setattr(sys, "argv", ["ds4", "serve", "-c", str(file), "--slots", "2"])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    monkeypatch.setattr(sys, "argv", ["ds4", "serve", "-c", str(file)])
    with pytest.raises(SystemExit):
        main()
    assert "two models have one name: a, a" in capsys.readouterr().err
