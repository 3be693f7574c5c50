"""`ds4 doctor`, with a check that only pretends."""

import json
import sys
from importlib.metadata import PackageNotFoundError

import pytest

from ds4.check import OpResult
from ds4.cli import main


@pytest.fixture
def run(monkeypatch, capsys):
    """Runs `ds4 doctor` in this process: (status, standard output, standard error)."""

    def run(*arguments, backend="reference"):
        command = ["ds4", "doctor", "--backend", backend, *arguments]
        monkeypatch.setattr(sys, "argv", command)
        with pytest.raises(SystemExit) as end:
            main()
        output = capsys.readouterr()
        return end.value.code or 0, output.out, output.err

    return run


@pytest.fixture
def checked(monkeypatch):
    """Replaces the check of a backend by a list of results."""
    right = OpResult("linear", "exact", 1e-7, 1e-4, 0.01, True)
    stored = OpResult("write", "exact", None, 1e-4, 0.01, True)
    results = [right, stored]
    monkeypatch.setattr("ds4.check.check_backend", lambda be: results)
    return results


def test_doctor_shows_the_machine_and_its_operations(run, checked):
    status, out, err = run()
    assert (status, err) == (0, "")
    for word in ("cpu", "memory", "gpus", "numpy", "linear", "write", "reference", "is right"):
        assert word in out
    report = json.loads(run("--json")[1])
    assert report["ok"]
    assert report["backend"] == {"name": "reference", "device": "cpu", "why": "as asked"}
    assert report["operations"][1] | {"seconds": 0} == {
        "name": "write",
        "cache": "exact",
        "error": None,
        "tolerance": 1e-4,
        "seconds": 0,
        "ok": True,
    }


def test_doctor_fails_with_a_wrong_operation(run, checked):
    checked.append(OpResult("index", "native", float("inf"), 1e-4, 0.01, False))
    status, out, _ = run()
    assert status == 1
    assert "wrong: index (native)" in out
    status, out, _ = run("--json")
    assert status == 1
    assert json.loads(out)["operations"][2]["error"] is None


def test_doctor_says_which_packages_are_missing(run, checked, monkeypatch):
    def missing(name):
        raise PackageNotFoundError(name)

    monkeypatch.setattr("importlib.metadata.version", missing)
    report = json.loads(run("--json")[1])
    assert report["versions"]["torch"] == "not installed"


def test_doctor_of_an_unknown_backend(run):
    status, out, err = run("--json", backend="nope")
    assert (status, out) == (1, "")
    assert err.startswith("error: no backend is called 'nope'")
