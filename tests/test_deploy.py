"""The files that set a server up: they parse, and name what there is."""

import configparser
import importlib.util
import json
import plistlib
import re
from pathlib import Path

import pytest

from ds4.errors import ConfigError
from ds4.server.client import ModelInfo
from ds4.server.metrics import EngineFigures, Metrics
from ds4.server.pool import Pool
from ds4.server.settings import read_settings
from ds4.server.supervisor import Supervisor
from ds4.server.watts import Watts
from ds4.server.wire import EngineSpec

ROOT = Path(__file__).parents[1]
DEPLOY = ROOT / "deploy"


def test_the_example_settings() -> None:
    settings = read_settings(DEPLOY / "ds4.toml")
    assert [model.name for model in settings.models] == ["flash", "flash-q2"]
    spec = settings.models[0].spec(settings.queue)
    assert spec.context == 131_072
    assert spec.max_waiting == 264


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("port = 'x'", r"Expected `int`, got `str` - at `\$.port`"),
        ("prot = 8000", "unknown field `prot`"),
        ("port = 70000", "port must be from 0 to 65535"),
        ("models = []", "at least one model"),
        ("queue = 0", "queue must be a finite number above 0"),
        ("[[models]]\nslots = 0", "slots and gpus must be at least 1"),
        ("[[models]]\ncache = 'x'", "Invalid enum value 'x'"),
        ("host = [", "toml"),
    ],
)
def test_wrong_settings_are_named(tmp_path: Path, text: str, match: str) -> None:
    file = tmp_path / "wrong.toml"
    file.write_text(text)
    with pytest.raises(ConfigError, match=match):
        read_settings(file)
    with pytest.raises(ConfigError, match=r"absent\.toml: cannot be read"):
        read_settings(tmp_path / "absent.toml")


def test_units_start_what_there_is() -> None:
    unit = configparser.RawConfigParser(strict=False)
    unit.read(DEPLOY / "ds4.service")
    assert "ds4 serve --config" in unit["Service"]["execstart"]
    plist = plistlib.loads((DEPLOY / "com.ds4.serve.plist").read_bytes())
    assert plist["ProgramArguments"][1:3] == ["serve", "--config"]
    assert "ds4" in (DEPLOY / "Dockerfile").read_text()


def test_the_dashboard_asks_for_metrics_that_exist() -> None:
    spec = importlib.util.spec_from_file_location("made", ROOT / "scripts/grafana_dashboard.py")
    assert spec is not None
    assert spec.loader is not None
    made = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(made)
    text = (DEPLOY / "grafana.json").read_text()
    assert json.loads(text) == made.dashboard()
    metrics = Metrics()
    pool = Pool([Supervisor(EngineSpec(), ModelInfo("a", 1), 1)])
    metrics.registry.register(EngineFigures(pool))
    metrics.registry.register(Watts([], lambda: 0))
    there = set()
    for family in metrics.registry.collect():
        suffix = "_total" if family.type == "counter" else ""
        there.add(family.name + suffix)
        if family.type == "histogram":
            there.add(family.name + "_bucket")
    asked = set(re.findall(r"\b(?:ds4|process)_\w+", text)) - {"ds4_serve"}
    assert asked <= there, asked - there
