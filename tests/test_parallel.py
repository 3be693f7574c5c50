"""Experts split over two and four processes on this machine, and what happens when one dies."""

import contextlib
import json
import os
import signal
import socket
import struct
import subprocess
import sys
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from ds4.backends.cuda import heads
from ds4.backends.cuda.placement.heat import save_heat

import ds4
from ds4.errors import BackendError
from ds4.parallel import frames, launch
from ds4.parallel.crew import Lead, Seat
from ds4.parallel.follow import Led, packed, unpacked
from ds4.parallel.start import heat_map_of
from ds4.ranks import balanced, share
from ds4.step import Chunk, plan
from ds4.weights.synthetic_tensor import Description, SyntheticTensor
from ds4.weights.tensor import HostTensor
from tests.fixtures import (
    drafter_state,
    plain_tensors,
    random_official_state,
    small_config,
    write_folder,
)
from tests.parallel_lead import results

ROOT = Path(__file__).parent.parent
EXPERTS = 9


@dataclass
class Run:
    process: subprocess.Popen[str]
    found: dict[str, Any]

    def end(self, victim: int) -> str:
        """Kill a process of it: what is said on standard error once all have ended."""
        os.kill(victim, signal.SIGKILL)
        _, errors = self.process.communicate(timeout=60)
        deadline = time.monotonic() + 60
        while any(_runs(pid) for pid in self.found["children"]):
            assert time.monotonic() < deadline, "a rank goes on"
            time.sleep(0.05)
        return errors


def _runs(pid: int) -> bool:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("split")
    fields = small_config(n_routed_experts=EXPERTS)
    state = random_official_state(fields) | drafter_state(fields)
    write_folder(path, fields, plain_tensors(state))
    return path


@pytest.fixture(scope="module")
def alone(folder: Path) -> dict[str, Any]:
    return results(ds4.load(folder, "torch", "cpu", "exact", context=128, speculate="mtp"))


@contextlib.contextmanager
def started(folder: Path, gpus: int) -> Iterator[Run]:
    """Ranks that read a heat map if there is one in the cache folder."""
    command = [sys.executable, "-m", "tests.parallel_lead", str(folder), str(gpus)]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    pipe = subprocess.PIPE
    with subprocess.Popen(command, cwd=ROOT, env=env, stdout=pipe, stderr=pipe, text=True) as p:
        try:
            assert p.stdout is not None
            line = p.stdout.readline()
            assert line, p.communicate()[1]
            yield Run(p, json.loads(line))
        finally:
            p.kill()


@pytest.mark.parametrize("gpus", [2, 4])
def test_ranks_compute_what_one_does_and_end_together(
    gpus: int,
    folder: Path,
    alone: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    held = [0, 1, 2, 3]  # of rank 0; the last one has one more
    if gpus == 4:
        pairs = np.tile(np.arange(EXPERTS) % 5, (4, 1))
        save_heat(heat_map_of(folder), pairs[:, ::-1])
        held = balanced(pairs[0, ::-1].tolist(), seats(gpus)[0])
        assert held != [0, 1]
    with started(folder, gpus) as run:
        assert run.found["held"] == held
        for name in ("logits", "both", "ahead"):
            assert np.abs(np.array(run.found[name]) - np.array(alone[name])).max() <= 5e-4
        for name in ("tokens", "guesses", "guessed"):
            assert run.found[name] == alone[name]
        if gpus == 2:
            assert run.found["again"] == alone["tokens"]
            assert run.end(run.process.pid).count("rank 0 has died") == 1
        else:
            errors = run.end(run.found["children"][1])
            assert run.process.returncode == 1
            assert errors == "error: rank 2 has died, and the others end too\n"


def test_ranks_whose_experts_are_in_two_memories() -> None:
    """Each rank fetches, evicts and swaps its own: the text is that of one process with all."""
    from tests.parallel_placed import results as placed

    command = [sys.executable, "-m", "tests.parallel_placed", "2"]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    found, want = json.loads(done.stdout), placed()
    assert found["held"] == [0, 1, 2, 3]
    assert found["tokens"] == want["tokens"]
    assert np.abs(np.array(found["logits"]) - np.array(want["logits"])).max() <= 5e-4
    assert found["misses"] > 20
    assert found["swaps"] > 3


@pytest.mark.parametrize("who", ["0", "1", "both", "none"])
def test_a_rank_that_fails_ends_the_others(who: str) -> None:
    command = [sys.executable, "-m", "tests.parallel_failing", who]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == (who != "none")
    assert ("RuntimeError: out of memory" in done.stderr) == (who != "none")
    if who != "both":  # of two, one may end the other before it says so
        assert ("error: rank 1: RuntimeError('out of memory')" in done.stderr) == (who == "1")


def test_backends_that_cannot_are_an_error_before_anything_starts() -> None:
    with pytest.raises(BackendError, match="--backend cuda"):
        ds4.load("demo", "reference", gpus=2)
    assert launch.current() is None


# parts


def test_a_step_comes_back_from_a_message() -> None:
    step = plan([Chunk(0, 3, [7, 8, 9, 1]), Chunk(2, 127, [9])], [4, 128], pad_to=7)
    told = unpacked(packed(5, step, ahead=True))
    back = told.step
    assert (told.number, back.span, told.ahead, told.drafting) == (5, step.span, True, False)
    assert unpacked(packed(5, step, drafting=True))[2:] == (False, True)
    for name in ("tokens", "slot", "pos", "last"):
        np.testing.assert_array_equal(getattr(back, name), getattr(step, name))
    assert back.emit.keys() == step.emit.keys()
    for ratio, blocks in step.emit.items():
        np.testing.assert_array_equal(back.emit[ratio], blocks)
    told = unpacked(packed(0, plan([Chunk(0, 0, [1])], [])))
    assert not told.ahead
    assert told.step.emit == {}
    assert told.step.tokens.tolist() == [1]


def seats(size: int) -> list[Any]:
    return [SimpleNamespace(rank=rank, size=size) for rank in range(size)]


def test_nothing_comes_between_a_change_and_its_rows() -> None:
    """A runner may be collected, and its end told, at any moment."""
    crew, led = Lead.__new__(Lead), Led.__new__(Led)
    sent: list[Any] = []
    crew._later = deque()

    def send(kind: int, payload: bytes = b"") -> None:
        sent.append(frames.unpacked(kind, payload))
        if len(sent) == 1:
            crew.tell_later({"do": "drop"})

    crew._send = send  # type: ignore[method-assign]
    led._crew, led._number = crew, 3
    led.change("restore_ending", [0, 0, 5], np.arange(4, dtype=np.uint8))
    crew.tell({"do": "last"})
    first, rows, *others = sent
    assert (first["name"], rows.tolist()) == ("restore_ending", [0, 1, 2, 3])
    assert [message["do"] for message in others] == ["drop", "last"]


def test_popular_experts_are_spread() -> None:
    popularity = [8.0, 7, 6, 5, 4, 3, 2, 1, 0.5]
    each = [balanced(popularity, seat) for seat in seats(2)]
    assert sorted(each[0] + each[1]) == list(range(9))
    assert [len(mine) for mine in each] == [len(share(9, seat)) for seat in seats(2)]
    loads = [sum(popularity[e] for e in mine) for mine in each]
    assert max(loads) / min(loads) < 1.1
    assert balanced([1.0] * 8, seats(2)[1]) == [1, 3, 5, 7]


@pytest.mark.parametrize("fmt", ["mxfp4", "mxfp8", "affine", "bf16", "fp8"])
def test_some_synthetic_experts_are_those_of_the_whole_stack(fmt: str) -> None:
    bits, group = (3, 64) if fmt == "affine" else (0, 0)
    whole = SyntheticTensor(Description(fmt, (6, 3, 64), 7, 0.1, bits=bits, group=group))
    some = whole.only([1, 2, 4])
    assert some.shape == (3, 3, 64)
    assert some != whole.of_shape(3, 3, 64)
    for ours, all_of_them in ((some.data, whole.data), (some.scales, whole.scales)):
        if all_of_them is not None:
            np.testing.assert_array_equal(ours, all_of_them[[1, 2, 4]])
    np.testing.assert_array_equal(some.decode(), whole.decode()[[1, 2, 4]])


def test_strangers_are_not_let_in(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ds4.parallel.crew.PATIENCE", 1.0)

    stranger = socket.socket()

    def knock(port: int) -> list[Any]:
        stranger.connect(("127.0.0.1", port))
        hello = b'{"rank": 1, "size": 2, "key": "other"}'
        stranger.sendall(struct.pack("<ii", 0, len(hello)) + hello)
        return []

    with stranger, pytest.raises(BackendError, match="rank 1 did not come"):
        Lead(Seat(0, 2, 0, 2, "127.0.0.1", 0, "key"), knock)


def test_a_half_set_environment_is_an_error_with_the_remedy(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(BackendError, match="through torchrun"):
        launch.from_environment()


@pytest.mark.parametrize("fmt", ["mxfp8", "affine", "fp8", "bf16"])
@pytest.mark.parametrize("made", [True, False])
def test_heads_are_cut_from_every_format(fmt: str, made: bool) -> None:
    bits, group = (4, 64) if fmt == "affine" else (0, 0)
    size = 256 if fmt == "fp8" else 128
    names = {"layers.0.attn.wq_b": (size, 128), "layers.0.attn.wo_a": (4, size, 128)}
    names |= {"layers.0.attn.wo_b": (128, size), "layers.0.attn.indexer.wq_b": (128, 128)}
    for name, shape in names.items():
        tensor: HostTensor = SyntheticTensor(
            Description(fmt, shape, 3, 0.1, bits=bits, group=group)
        )
        if not made:
            more = tensor.scales, tensor.biases, tensor.bits, tensor.group
            tensor = HostTensor(tensor.format, tensor.data, *more)
        parts = [heads.part(name, tensor, seat).decode() for seat in seats(2)]
        axis = -1 if name.endswith("wo_b") else 0
        joined = parts[0] if "indexer" in name else np.concatenate(parts, axis)
        np.testing.assert_array_equal(joined, tensor.decode())
