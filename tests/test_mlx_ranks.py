"""Experts split over two processes on this machine, joined by a ring of TCP connections."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from ds4.backends.mlx.ranks import held

import ds4
from ds4.errors import BackendError
from ds4.ranks import Alone, share

ROOT = Path(__file__).parent.parent


def ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for one in sockets:
        one.bind(("127.0.0.1", 0))
    numbers = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return numbers


def launch(size: int, folder: Path) -> list[dict[str, Any]]:
    """What mlx.launch does, on this machine."""
    hosts = folder / "hosts.json"
    hosts.write_text(json.dumps([[f"127.0.0.1:{port}"] for port in ports(size)]))
    processes = []
    for rank in range(size):
        env = os.environ | {"MLX_RANK": str(rank), "MLX_HOSTFILE": str(hosts)}
        command = [sys.executable, "-m", "tests.mlx_rank"]
        pipe = subprocess.PIPE
        processes.append(subprocess.Popen(command, cwd=ROOT, env=env, stdout=pipe, text=True))
    try:
        return [json.loads(process.communicate(timeout=120)[0]) for process in processes]
    finally:
        for process in processes:
            process.kill()


def test_two_ranks_are_one_model(tmp_path: Path) -> None:
    first, second = launch(2, tmp_path)
    assert [(one["rank"], one["size"], one["experts"]) for one in (first, second)] == [
        (0, 2, 8),
        (1, 2, 8),
    ]
    assert first["logits"] == second["logits"]
    assert first["tokens"] == second["tokens"]
    want = ds4.load("demo", "mlx", "cpu", context=128).logits([3, 14, 15, 92, 65, 35])[-1]
    assert np.abs(np.array(first["logits"]) - want).max() <= 2e-2  # native rows may round apart


def test_shares_cover_every_expert_once() -> None:
    for size in (1, 2, 3, 7):
        ranks = [SimpleNamespace(rank=rank, size=size) for rank in range(size)]
        assert [e for one in ranks for e in share(16, one)] == list(range(16))  # type: ignore
    with pytest.raises(BackendError, match="use fewer"):
        share(3, SimpleNamespace(rank=0, size=4))  # type: ignore[arg-type]
    assert share(16, Alone()) == range(16)


def test_an_expert_elsewhere_weighs_nothing_and_reads_nothing_new() -> None:
    ids = mx.array([[1, 9, 4], [8, 9, 10]])
    weights = mx.array([[0.5, 0.25, 1.0], [0.5, 0.25, 1.0]])
    local, gain = held(ids, weights, range(4, 8))
    assert local.tolist() == [[0, 0, 0], [0, 0, 0]]
    assert gain.tolist() == [[0, 0, 1], [0, 0, 0]]
    local, gain = held(ids, weights, range(8, 16))
    assert local.tolist() == [[1, 1, 1], [0, 1, 2]]
    assert gain.tolist() == [[0, 0.25, 0], [0.5, 0.25, 1]]


def test_ranks_that_cannot_be_joined_are_an_error_with_the_remedy(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("MLX_RANK", "0")
    monkeypatch.delenv("MLX_HOSTFILE", raising=False)
    with pytest.raises(BackendError, match=r"through mlx\.launch"):
        ds4.load("demo", "mlx", "cpu")
