"""Scripts of bench/ import, and what they import in functions exists: mypy sees no backend."""

import ast
import importlib
from pathlib import Path

import pytest

OURS = "ds4", "bench", "tests"
SCRIPTS = sorted(Path(__file__).parents[1].joinpath("bench").glob("[a-z]*.py"))


@pytest.mark.parametrize("script", SCRIPTS, ids=[script.stem for script in SCRIPTS])
def test_imports_exist(script: Path) -> None:
    imported("bench", script.stem)
    for node in ast.walk(ast.parse(script.read_text())):
        if not isinstance(node, ast.ImportFrom):
            continue
        module = ".".join(filter(None, ("bench" if node.level else "", node.module)))
        if module.split(".")[0] in OURS:
            for alias in node.names:
                imported(module, alias.name)


def imported(module: str, name: str) -> None:
    """Fails unless a module has this name; skips if it needs a package that is not installed."""
    try:
        if not hasattr(importlib.import_module(module), name):
            importlib.import_module(f"{module}.{name}")
    except ModuleNotFoundError as error:
        missing = str(error.name)
        if missing.split(".")[0] in OURS:
            raise
        pytest.skip(f"{missing} is not installed")
