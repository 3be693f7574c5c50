"""A batch over a local Ray cluster whose one node is killed; bench.ray_batch is the longer run."""

import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("ray", reason="ray is not installed: pip install 'ds4[cluster]'")


def test_a_batch_survives_the_death_of_a_node() -> None:
    command = [sys.executable, "-m", "bench.ray_batch", "--nodes", "2", "--requests", "12"]
    root = Path(__file__).parent.parent
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "\n12 answers" in "\n" + done.stdout
