"""Each part of the model against transformers' module: recorded inputs in, recorded outputs out."""

from typing import Any

import numpy as np
import pytest
import torch

import ds4
from ds4 import model
from ds4.backend import Array
from ds4.runner import Runner
from ds4.step import Chunk, Step, plan
from tests.conftest import Case

TOLERANCE = 2e-5  # relative to the largest value

Record = dict[str, tuple[Any, Any]]  # module path -> its first input, its output


@pytest.fixture(scope="module")
def record(case: Case) -> Record:
    """What went into and came out of every module in one run of the whole sequence."""
    seen: Record = {}

    def hook(name: str) -> Any:
        def keep(module: Any, args: Any, kwargs: Any, out: Any) -> None:
            first = args[0] if args else kwargs.get("hidden_states")
            seen[name] = (first, out)

        return keep

    modules = case.model.named_modules()
    handles = [m.register_forward_hook(hook(name), with_kwargs=True) for name, m in modules]
    with torch.no_grad():
        case.model(torch.tensor([case.ids]), use_cache=False)
    for handle in handles:
        handle.remove()
    return seen


@pytest.fixture
def runner(case: Case, backend: str) -> Runner:
    return ds4.load(case.folder, backend, cache="exact", context=128).runner


@pytest.fixture
def step(case: Case, runner: Runner) -> Step:
    ratios = {ratio for ratio in runner.cfg.compress_ratios if ratio}
    return plan([Chunk(0, 0, case.ids)], ratios, every_row=True).on(runner.be)


def near(runner: Runner, got: Array, want: torch.Tensor) -> None:
    found, right = runner.be.download(got), want[0].numpy()
    assert found.shape == right.shape
    assert np.abs(found - right).max() <= TOLERANCE * np.abs(right).max()


def given(runner: Runner, x: torch.Tensor) -> Array:
    return runner.be.upload(x[0].numpy())


def test_hyper_connections_and_norms(runner: Runner, record: Record) -> None:
    for i, w in enumerate(runner.weights.layers):
        for hc, norm, ours, weight in (
            ("attn_hc", "input_layernorm", w.hc_attn, w.attn_norm),
            ("ffn_hc", "post_attention_layernorm", w.hc_ffn, w.ffn_norm),
        ):
            h = given(runner, record[f"model.layers.{i}.{hc}"][0])
            x, _ = runner.be.hc_pre(ours, weight, h, runner.cfg)
            near(runner, x, record[f"model.layers.{i}.{norm}"][1])


def test_attention(runner: Runner, step: Step, record: Record) -> None:
    for i, (w, c) in enumerate(zip(runner.weights.layers, runner.cache, strict=True)):
        x, want = record[f"model.layers.{i}.self_attn"]
        got = model.attention(runner.be, runner.cfg, w.attn, c, step, given(runner, x))
        near(runner, got, want[0])


def test_experts(runner: Runner, step: Step, record: Record) -> None:
    for i, w in enumerate(runner.weights.layers):
        x, want = record[f"model.layers.{i}.mlp"]
        near(runner, model.moe(runner.be, runner.cfg, w.ffn, step, given(runner, x)), want)


def test_layers(runner: Runner, step: Step, record: Record) -> None:
    for i, (w, c) in enumerate(zip(runner.weights.layers, runner.cache, strict=True)):
        h, want = record[f"model.layers.{i}"]
        near(runner, model.block(runner.be, runner.cfg, w, c, step, given(runner, h)), want)


def test_head(runner: Runner, record: Record) -> None:
    be, cfg, w = runner.be, runner.cfg, runner.weights
    h, want = record["model.hc_head"]
    near(runner, be.hc_head(w.hc_head, given(runner, h), cfg), want)
    x, want = record["model.norm"]
    near(runner, be.rms_norm(w.norm, given(runner, x), cfg.rms_norm_eps), want)
    x, want = record["lm_head"]
    near(runner, be.linear(w.head, given(runner, x)), want)
