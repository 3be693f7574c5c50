"""Files that people hand in, damaged or hostile: each is one line with the file and the remedy."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ds4.bench import quality, results, workload
from ds4.bench.compare import rows_of
from ds4.config import Config
from ds4.errors import BenchError, ConfigError, Ds4Error, PowerError
from ds4.folder import sampling_defaults
from ds4.loader import find_model
from ds4.power import calibration
from ds4.server.clients import Endpoint, LaunchError, opencode
from ds4.weights.verify import verify
from tests.bench_sim import measured

SERVER = Endpoint("http://127.0.0.1:8000", {"flash": 131_072})


def heat(path: Path) -> None:
    pytest.importorskip("torch")
    pytest.importorskip("ds4.backends.cuda.placement.heat").load_heat(path, 1, 1)


READERS: list[tuple[str, Callable[[Path], Any], type[Ds4Error], str]] = [
    ("results.json", results.read, BenchError, "give a file that ds4 bench wrote"),
    ("ladder.json", quality.measured, BenchError, "give what ds4 eval --ladder --json printed"),
    ("box.json", calibration.load, PowerError, "make one with ds4 bench --calibrate"),
    ("config.json", Config.from_file, ConfigError, "download it again"),
    (
        "generation_config.json",
        lambda path: sampling_defaults(path.parent),
        ConfigError,
        "correct it or remove the file",
    ),
    (
        ".config/opencode/opencode.json",
        lambda path: opencode(SERVER, path.parents[2]).write(),
        LaunchError,
        "add what is shown by hand",
    ),
    ("heat.json", heat, ConfigError, "remove it, and a new one will be made"),
]


@pytest.mark.parametrize(("name", "read", "kind", "remedy"), READERS, ids=[r[0] for r in READERS])
@pytest.mark.parametrize("content", [b"[" * 100_000, b'"\xff"', b"{"], ids=["deep", "bytes", "cut"])
def test_what_is_no_json(
    tmp_path: Path,
    content: bytes,
    name: str,
    read: Callable[[Path], Any],
    kind: type[Ds4Error],
    remedy: str,
) -> None:
    file = tmp_path / name
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(content)
    with pytest.raises(kind) as refused:
        read(file)
    message = str(refused.value)
    assert message.startswith(f"{file}: is not valid JSON: ")
    assert message.endswith(f"; {remedy}")
    assert file.read_bytes() == content


@pytest.mark.parametrize(
    ("content", "said"), [(b"\xff", "is not UTF-8"), (b"x=" + b"[" * 9999, "")]
)
def test_workloads_that_are_no_text(tmp_path: Path, content: bytes, said: str) -> None:
    file = tmp_path / "work.toml"
    file.write_bytes(content)
    with pytest.raises(BenchError) as refused:
        workload.read_workloads(file)
    assert str(refused.value).startswith(f"{file}: {said}")


@pytest.mark.parametrize(
    "field", ["rate = nan", "rate = inf", "seconds = nan", "most_seconds = nan"]
)
def test_workloads_with_numbers_that_are_none(tmp_path: Path, field: str) -> None:
    file = tmp_path / "work.toml"
    file.write_text(f'[[workload]]\nname = "a"\n{field}\n')
    with pytest.raises(BenchError, match="workload a: rate and most_seconds must be above 0"):
        workload.read_workloads(file)


@pytest.fixture(scope="module")
def found() -> dict[str, Any]:
    one = workload.Workload("closed@1", prompt_tokens=10, output_tokens=5, seconds=2)
    made: dict[str, Any] = json.loads(json.dumps(measured([one])))
    return made


@pytest.mark.parametrize(
    ("path", "value", "said"),
    [
        (("workloads",), 5, "workloads is 5, no list of objects"),
        (("summary",), [3], "summary is [3], no list of objects"),
        (("terms",), None, "terms is null, no object"),
        (("targets", 0), {}, "targets[0]: recipe is missing"),
        (("workloads", 0, "concurrency"), "one", 'workloads[0]: concurrency is "one"'),
        (("summary", 0, "figures"), None, "summary[0]: figures is null"),
        (("summary", 0, "figures", "output_tok_s"), "1", 'figures[0]: output_tok_s is "1"'),
        (("terms", "years"), 0, "terms: years must be above 0; tariff and price not below"),
        (("summary", 0, "workload"), "other", 'summary: workloads has no "other"'),
    ],
)
def test_results_with_a_damaged_field(
    tmp_path: Path, found: dict[str, Any], path: tuple[Any, ...], value: Any, said: str
) -> None:
    file = tmp_path / "box.json"
    file.write_text(json.dumps(found))
    assert rows_of([results.read(file)])
    broken = json.loads(file.read_text())
    at = broken
    for step in path[:-1]:
        at = at[step]
    at[path[-1]] = value
    file.write_text(json.dumps(broken))
    with pytest.raises(BenchError) as refused:
        results.read(file)
    assert str(refused.value) == f"{file}: {said}; give a file that ds4 bench wrote"


@pytest.mark.parametrize(
    ("name", "remedy"),
    [
        ("config.json", "download it again"),
        ("tokenizer.json", "download it again"),
        ("model.safetensors.index.json", "download it again"),
        ("generation_config.json", "correct it or remove the file"),
    ],
)
def test_a_pipe_is_refused_instead_of_waited_for(tmp_path: Path, name: str, remedy: str) -> None:
    folder = tmp_path / "model"
    shutil.copytree(find_model("demo"), folder)
    (folder / name).unlink(missing_ok=True)
    os.mkfifo(folder / name)
    assert f"{folder / name}: is no regular file; {remedy}" in verify(folder).problems
