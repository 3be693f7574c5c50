"""Metal kernels: their text run on a CPU beside their twins, and the gate that lets them in."""

import dataclasses
import json
import logging
import shutil
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from ds4.backends.mlx import Mlx, kernels, ops, weights
from ds4.backends.mlx.kernels import gate, trials
from ds4.backends.mlx.kernels import launch as metal

from ds4.backend import open_backend
from ds4.check import small_config
from ds4.cli.doctor import doctor
from ds4.proxy import Pair
from ds4.runner import Runner
from ds4.weights import load_weights
from ds4.weights.synthetic import SyntheticCheckpoint
from tests import metal_on_cpu

needs_compiler = pytest.mark.skipif(not shutil.which("g++"), reason="runs shader text through g++")


@pytest.fixture
def on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metal, "launch", metal_on_cpu.launch)


def shapes() -> SimpleNamespace:
    """Small, but with several simdgroups, several words a lane, and every kernel served."""
    cfg = small_config()
    changed = {
        "hidden_size": 512,
        "num_attention_heads": 3,
        "head_dim": 192,
        "n_routed_experts": 64,
        "num_experts_per_tok": 5,
        "moe_intermediate_size": 24,
        "sliding_window": 13,
        "index_topk": 22,
        "vocab_size": 400,
    }
    return SimpleNamespace(**(vars(cfg) | changed))


@needs_compiler
def test_every_kernel_computes_what_its_twin_does(
    on_cpu: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gate, "REPEATS", 1)
    monkeypatch.setattr(gate, "ROUNDS", 1)
    seen = set()
    for trial in trials.trials(shapes(), tokens=3):
        verdict = gate.judge(trial)
        assert verdict.differing is not None, verdict
        assert verdict.differing <= trial.share, verdict
        seen.add(trial.name)
    assert seen == set(kernels.NAMES)


@needs_compiler
def test_a_model_runs_on_its_kernels(on_cpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """All of them at once, every operation beside the reference: prefill, then two sequences."""
    monkeypatch.setattr(ops, "upload", lambda tensor, device: weights.pack(tensor))
    used: set[str] = set()
    for name, kernel in kernels.NAMES.items():
        monkeypatch.setitem(kernels.NAMES, name, _noting(name, kernel, used))
    cfg = dataclasses.replace(
        small_config(),
        hidden_size=256,
        n_routed_experts=32,
        compress_ratios=(0, 4, 8),
        num_hidden_layers=3,
        num_hash_layers=1,
    )
    be = Mlx("cpu", "exact")
    be.kernels = frozenset(kernels.NAMES)
    pair: Any = Pair(open_backend("reference", cache="exact"), be, 1e-4)
    runner = Runner(pair, cfg, load_weights(pair, cfg, SyntheticCheckpoint(cfg)), 64, 2, 24)
    tokens = np.random.default_rng(0).integers(0, cfg.vocab_size, 80).tolist()
    runner.run({0: tokens[:6]})
    runner.run({0: tokens[6:16], 1: tokens[40:45]})
    for i in range(2):
        runner.run({0: tokens[i : i + 1], 1: tokens[50 + i : 51 + i]}, pad_to=3)
    assert used == set(kernels.NAMES)


def _noting(name: str, kernel: Callable[..., Any], used: set[str]) -> Callable[..., Any]:
    def noted(*arguments: Any) -> Any:
        used.add(name)
        return kernel(*arguments)

    return noted


# the gate


def twin(x: mx.array) -> mx.array:
    return x * 2


def trial_of(kernel: Callable[..., Any], share: float = 0.0) -> trials.Trial:
    return trials.Trial("double", kernel, twin, (mx.arange(1000.0),), share=share)


class Clock:
    """Seconds that pass when a kernel runs, not in between."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


def taking(clock: Clock, seconds: float, run: Callable[..., Any]) -> Callable[..., Any]:
    def timed(*arguments: Any) -> Any:
        clock.now += seconds
        return run(*arguments)

    return timed


def judged(kernel_seconds: float, twin_seconds: float) -> gate.Verdict:
    clock = Clock()
    kernel = taking(clock, kernel_seconds, lambda x: x + x)
    trial = trial_of(kernel)
    slow = dataclasses.replace(trial, twin=taking(clock, twin_seconds, twin))
    return gate.judge(slow, clock)


def test_a_right_and_faster_kernel_is_used() -> None:
    verdict = judged(3e-6, 5e-6)
    assert verdict.used
    assert (verdict.kernel_us, verdict.twin_us) == pytest.approx((3, 5))


def test_a_slower_kernel_is_switched_off() -> None:
    verdict = judged(6e-6, 5e-6)
    assert not verdict.used
    assert verdict.why == "it is slower: 6.0 us, without it 5.0"


def _off_by_one_place(x: mx.array) -> mx.array:
    return mx.where(mx.arange(x.size) == 7, x * 2 + 1, x * 2)


def _nan(x: mx.array) -> mx.array:
    return mx.where(mx.arange(x.size) == 7, float("nan"), x * 2)


@pytest.mark.parametrize("kernel", [_off_by_one_place, _nan, lambda x: (x * 2)[:-1]])
def test_a_wrong_kernel_is_switched_off(kernel: Callable[..., Any]) -> None:
    verdict = gate.judge(trial_of(kernel))
    assert not verdict.used
    assert "differ" in verdict.why


def test_a_kernel_that_does_not_compile_is_switched_off_with_one_line(
    caplog: pytest.LogCaptureFixture,
) -> None:
    def broken(x: mx.array) -> mx.array:
        raise RuntimeError("error: use of undeclared identifier\nand 40 lines more")

    with caplog.at_level(logging.WARNING, "ds4"):
        verdicts = gate.tried([trial_of(broken)])
    assert [one.used for one in verdicts] == [False]
    assert caplog.messages == [
        "Metal kernel double is off: it does not run: error: use of undeclared identifier"
    ]


def test_a_few_roundings_of_a_last_bit_are_allowed_where_a_trial_says_so() -> None:
    assert gate.judge(trial_of(_off_by_one_place, share=0.01)).differing == pytest.approx(0.001)
    assert "differ" not in gate.judge(trial_of(_off_by_one_place, share=0.01)).why


def test_without_a_gpu_no_kernel_is_tried() -> None:
    assert Mlx("cpu").kernels == frozenset()


def test_doctor_shows_what_was_tried(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    good = gate.Verdict("attend", True, "right and faster", 0.0, 41.5, 90.25)
    slow = gate.Verdict("route", False, "it is slower: 9.0 us, without it 5.0", 0.0, 9.0, 5.0)
    mac = SimpleNamespace(name="mlx", device="gpu", verdicts=(good, slow))
    monkeypatch.setattr("ds4.loader.choose_backend", lambda: ("mlx", "Apple Silicon"))
    monkeypatch.setattr("ds4.backend.open_backend", lambda name, device: mac)
    monkeypatch.setattr("ds4.check.check_backend", lambda be: [])
    doctor(backend="auto", device="auto", as_json=False)
    shown = capsys.readouterr().out
    for word in ("kernels tried here", "attend", "41.5", "90.2", "on", "off: it is slower"):
        assert word in shown
    doctor(backend="auto", device="auto", as_json=True)
    kernels = json.loads(capsys.readouterr().out)["kernels"]
    assert [(one["name"], one["used"]) for one in kernels] == [("attend", True), ("route", False)]
