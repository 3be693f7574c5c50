"""The command as a process: closed and full streams, what cannot be written."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from ds4.loader import find_model

FULL = Path("/dev/full")
COMMAND = [sys.executable, "-m", "ds4"]


def shell(line: str) -> tuple[int, str]:
    """Status and standard error of a line in which $DS4 is the command."""
    env = {"DS4": " ".join(COMMAND), "PATH": "/usr/bin:/bin", "NO_COLOR": "1"}
    found = subprocess.run(
        ["sh", "-c", line], env=env, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, timeout=120
    )
    return found.returncode, found.stderr.decode()


@pytest.mark.skipif(not FULL.exists(), reason="no /dev/full")
@pytest.mark.parametrize("arguments", ["--version", "plan --machine h100", "plan --json"])
def test_a_full_disk_is_one_line(arguments: str) -> None:
    assert shell(f"$DS4 {arguments} > /dev/full") == (1, "error: No space left on device\n")


def test_closed_streams() -> None:
    assert shell("$DS4 generate <&-") == (1, "error: standard input is empty\n")
    assert shell("$DS4 plan --machine h100 >&-") == (0, "")


@pytest.mark.parametrize("option", ["--html", "--markdown", "--csv"])
def test_where_nothing_can_be_written(option: str, tmp_path: Path) -> None:
    status, error = shell(f"$DS4 compare --article {option} {tmp_path}/no/x")
    assert (status, error.count("\n")) == (1, 1)
    assert error.startswith(f"error: {tmp_path}/no/x")


def test_text_that_standard_output_cannot_say(tmp_path: Path) -> None:
    (tmp_path / "é").mkdir()
    shutil.copy(find_model("demo") / "config.json", tmp_path / "é")
    line = f"cd {tmp_path}; PYTHONIOENCODING=ascii $DS4 plan --machine h100 --model é"
    assert shell(line) == (0, "")


@pytest.mark.skipif(sys.platform == "darwin", reason="names are UTF-8 there")
def test_a_folder_whose_name_is_not_utf_8(tmp_path: Path) -> None:
    status, error = shell(f"cd {tmp_path}; m=$(printf 'a\\377'); mkdir $m; $DS4 verify $m")
    assert (status, error.count("\n")) == (1, 1)
    assert "not UTF-8; rename it" in error
