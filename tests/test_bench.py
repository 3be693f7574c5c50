"""The benches run on a CPU with a tiny model, and their arithmetic is right."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from bench import kernels, million, speed, startup
from bench.floors import step_bytes, touched
from bench.models import Model, open_model
from bench.operations import Labels, Marked, attributed, operations, trace
from bench.routing import watch
from ds4.loader import Synthetic
from ds4.plan.flash import flash
from ds4.plan.machines import named
from ds4.plan.memory import CHUNK, predict
from ds4.plan.report import make_report
from ds4.plan.report import open_model as open_plan
from ds4.plan.sizes import weight_sizes
from ds4.quant.recipes import RECIPES

TINY = "--synthetic", "tiny", "--device", "cpu"


@pytest.fixture(scope="module")
def model() -> Model:
    return open_model(Synthetic("tiny", "q4_K_M", routing="skewed"), "cuda", "cpu")


def rows(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_speed_writes_a_row_a_case(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "speed.jsonl"
    cases = "--batches", "1,3", "--contexts", "64,96", "--prompts", "40", "--steps", "2"
    speed.main([*TINY, "--recipes", "q2", "--unique-layers", "all", *cases, "--out", str(out)])
    made = rows(out)
    assert [(row["kind"], row["batch"], row["tokens"]) for row in made] == [
        ("decode", 1, 64),
        ("decode", 3, 64),
        ("decode", 1, 96),
        ("text", 1, 64),
        ("prefill", 1, 40),
        ("operations", 1, 64),
    ]
    assert all(0 < row["share"] < 1 and row["tok_s"] > 0 for row in made[:-1])
    assert made[-1]["operations"][0]["us"] > 0
    assert 3 <= made[1]["experts"] <= 8
    table = capsys.readouterr().out
    assert "experts" in table
    assert "hc_pre" in table


def test_a_filled_cache_is_valid_at_its_end(model: Model) -> None:
    runner = model.runner(2, 192, 32, length=180)
    assert runner.lengths == [180, 180]
    for rows_ in (runner.cache[0].window, runner.cache[1].index_pool, runner.cache[2].pool):
        assert rows_.data[:, : rows_.size].abs().sum(-1).min() > 0
    logits = runner.run(model.next_tokens(2))
    assert torch.isfinite(logits).all()
    assert runner.lengths == [181, 181]


def test_operations_account_for_every_weight(model: Model) -> None:
    runner = model.runner(1, 64, 32, length=40)
    costs = {cost.name: cost for cost in operations(model, runner, model.next_tokens(1))}
    assert costs["hc_pre"].calls == 2 * model.cfg.num_hidden_layers
    assert all(cost.seconds > 0 for cost in costs.values())
    assert {"attention, ratio 0", "attention, ratio 4", "index", "experts"} <= costs.keys()
    weights = sum(
        cost.nbytes for name, cost in costs.items() if name.split(",")[0] not in
        ("attention", "index", "remember")
    )  # fmt: skip
    sizes = weight_sizes(model.cfg, RECIPES["q4_K_M"])
    attn = ("attn_sink", "kv_norm", "ape", "compressor.norm")
    inside = sum(
        model.source.nbytes(n) for n in model.source.shapes if any(part in n for part in attn)
    )
    assert weights + inside == pytest.approx(sizes.token, rel=1e-3)
    names = Labels(model, runner, 1)
    label, nbytes = names.find("linear", (model.weights.head, None))
    assert (label, nbytes) == ("linear head", sizes.by_class["head"])


def test_kernels_are_attributed_by_when_they_were_launched() -> None:
    def mark(name: str, ts: float, dur: float) -> dict[str, Any]:
        return {"cat": "user_annotation", "name": name, "ts": ts, "dur": dur}

    def launch(ts: float, number: int) -> dict[str, Any]:
        return {"cat": "cuda_driver", "name": "l", "ts": ts, "args": {"correlation": number}}

    def kernel(number: int, dur: float) -> dict[str, Any]:
        args = {"correlation": number}
        return {"cat": "kernel", "name": "k", "ts": 90.0, "dur": dur, "args": args}

    record = [
        *(mark("ds4:a", 1, 4), mark("ds4:b", 6, 2), mark("other", 8.5, 9), mark("ds4:a", 20, 1)),
        *(launch(2, 1), launch(4.5, 2), launch(7, 3), launch(9, 4), launch(20.5, 5)),
        *(kernel(1, 10), kernel(2, 20), kernel(3, 5), kernel(4, 7), kernel(5, 1), kernel(6, 3)),
    ]
    assert list(attributed(record)) == [("a", 1e-5), ("a", 2e-5), ("b", 5e-6), ("a", 1e-6)]


def test_the_profiler_leaves_the_marks_that_are_looked_for(model: Model) -> None:
    runner = model.runner(1, 64, 32, length=40)
    labels = Labels(model, runner, 1)
    record = trace(lambda: Marked(model.be, labels).rms_norm(None, torch.ones(2, 8), 1e-6))
    (mark,) = [event for event in record if event.get("cat") == "user_annotation"
               and event["name"].startswith("ds4:")]  # fmt: skip
    assert mark["name"] == "ds4:rms_norm"
    assert mark["dur"] > 0


def test_bytes_of_a_step(model: Model) -> None:
    sizes = weight_sizes(model.cfg, RECIPES["q4_K_M"])
    assert touched(model, 1) == model.cfg.num_experts_per_tok
    assert touched(model, 1000) == pytest.approx(model.cfg.n_routed_experts)
    assert step_bytes(model, 1, 0, 0, 3) == pytest.approx(sizes.token, rel=1e-6)


def test_skewed_routing_repeats_and_concentrates(model: Model) -> None:
    seen = watch(model, model.runner(4, 64, 32, length=40))
    assert 3 <= seen.experts <= 8
    assert 0 < seen.repeated <= 1


def test_predicted_memory_is_what_is_allocated(model: Model) -> None:
    """Rows are float32 on a CPU: their number is checked, and the bytes of the weights."""
    runner = model.runner(2, 100, 20)
    want = predict(model.cfg, RECIPES["q4_K_M"], 100, 2, 20)
    state = sum(r.data.nbytes for c in runner.cache for r in (c.rows, c.index_rows) if r)
    assert want.state == state
    kv = sum(
        r.data.shape[0] * r.data.shape[1] for c in runner.cache for r in (c.window, c.pool) if r
    )
    index = sum(
        c.index_pool.data.shape[0] * c.index_pool.data.shape[1]
        for c in runner.cache
        if c.index_pool
    )
    assert want.cache == kv * (64 + 4 + 128) + index * (64 + 4)
    assert want.weights == weight_sizes(model.cfg, RECIPES["q4_K_M"]).total
    half = predict(model.cfg, RECIPES["q4_K_M"], 100, 2, 20, unique_layers=4)
    assert half == want


def test_the_plan_says_what_a_gpu_will_hold(capsys: pytest.CaptureFixture[str]) -> None:
    report = make_report(open_plan("flash"), named("h100"), 8192)
    native = report["recipes"][-1]["cuda_bytes"]
    want = predict(flash(), RECIPES["q8_0"], 8192)
    assert native["total"] == want.held + want.working + want.recorded == want.total
    assert native["cache"] == pytest.approx(32.0e6 + 43 * CHUNK * 584, rel=0.01)  # a chunk more
    assert native["working"] == pytest.approx(1.8e9, rel=0.01)
    long = predict(flash(), RECIPES["q8_0"], 1 << 20, 1, 8192)
    assert long.cache == pytest.approx(3682e6 + 43 * 8192 * 584, rel=0.01)


def test_a_long_prompt_runs_to_its_end(tmp_path: Path) -> None:
    out = tmp_path / "million.jsonl"
    million.main([*TINY, "--tokens", "300", "--chunk", "64", "--layers", "3", "--out", str(out)])
    (row,) = rows(out)
    assert (row["tokens"], row["layers"], row["chunk"]) == (300, 3, 64)
    assert row["decode_tok_s"] > 0
    assert row["prefill_tok_s"] > 0


def test_start_up_is_taken_apart(tmp_path: Path) -> None:
    out = tmp_path / "startup.jsonl"
    startup.main([*TINY, "--backend", "reference", "--runs", "1", "--out", str(out)])
    (row,) = rows(out)
    parts = row["parts"]
    assert all(seconds >= 0 for seconds in parts.values())
    first = ("python", "import numpy", "open the device", "load weights", "prompt, first")
    assert row["first_token_s"] == pytest.approx(sum(parts[part] for part in first), abs=0.01)


def test_a_wrong_kernel_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def generator() -> Iterator[kernels.Case]:
        def make(device: str, number: int) -> Tensor:
            return torch.randn(64, generator=torch.Generator().manual_seed(number))

        for name, run in {
            "right": lambda x: x * 2,
            "wrong": lambda x: x * 2.1,
            "unwritten": lambda x: torch.where(x > 0, x * 2, torch.nan),
        }.items():
            yield kernels.Case(name, make, run, lambda x: x.double() * 2, 512)

    monkeypatch.setattr(kernels, "_REGISTRY", {"double": generator})
    found = {c.name: kernels.measure(c, "cpu") for c in kernels.chosen([])}
    assert [name for name, result in found.items() if result.right] == ["right"]
    assert found["wrong"].error == pytest.approx(0.05)
    assert [case.name for case in kernels.chosen(["unw"])] == ["unwritten"]
    with pytest.raises(SystemExit):
        kernels.main(["--device", "cpu", "wrong"])
