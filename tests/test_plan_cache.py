"""The cache that a plan counts is the one that the backend of that machine holds."""

from types import SimpleNamespace
from typing import Any

import pytest

from ds4.backend import open_backend
from ds4.cache import make_cache
from ds4.check import small_config
from ds4.plan import estimate
from ds4.plan.estimate import fit, sequence_bytes
from ds4.plan.flash import flash
from ds4.plan.machines import detected, named
from ds4.plan.memory import held_beside
from ds4.plan.placement import need_of_recipe
from ds4.plan.report import Model, make_report, open_model
from ds4.plan.sizes import cache_bytes, cache_read_bytes
from ds4.plan.slots import FEW, default_slots
from ds4.quant.recipes import RECIPES
from ds4.runner import MAX_CHUNK
from tests.test_cli import run

__all__ = ["run"]  # a fixture

CFG, MAC = flash(), named("m4max-128")
KINDS = {"m4max-128": "mlx", "2x5090": "cuda", "dgxspark": "cuda", "strixhalo": "reference"}


@pytest.mark.parametrize("name", ["mlx", "reference"])
@pytest.mark.parametrize("mode", ["native", "exact"])
@pytest.mark.parametrize(("model", "context", "chunk"), [("demo", 1027, 256), ("small", 40, 40)])
def test_a_count_is_what_the_backend_allocates(
    name: str, mode: Any, model: str, context: int, chunk: int
) -> None:
    if name == "mlx":
        pytest.importorskip("mlx.core")
    cfg = small_config() if model == "small" else open_model("demo").cfg
    made = make_cache(open_backend(name, "cpu", mode), cfg, 1, context, chunk)
    rows = [one for layer in made for one in vars(layer).values() if one is not None]
    counted = held_beside(cfg, context, chunk, mode, name)
    assert counted == sum(one.data.nbytes for one in rows)


def test_chunks_are_those_of_the_backends(monkeypatch: pytest.MonkeyPatch) -> None:
    assert estimate.OTHER_CHUNK == MAX_CHUNK
    ops = pytest.importorskip("ds4.backends.mlx.ops")
    monkeypatch.setattr(ops, "_device", lambda device: "gpu")
    monkeypatch.setattr(ops, "set_limits", lambda: None)
    monkeypatch.setattr(ops, "verdicts", lambda: ())
    monkeypatch.setattr(ops.mx, "set_default_device", lambda device: None)
    assert ops.Mlx("gpu").max_chunk == estimate.CHUNKS["mlx"]


def test_which_backend_runs_where() -> None:
    assert {name: named(name).backend for name in KINDS} == KINDS
    plain = detected({"cpu": "x", "memory": "64 GiB", "gpus": ["none found"]})
    assert plain.backend == "reference"


def test_a_mac_holds_bf16_rows() -> None:
    """6,880 bytes a token (specification 4.2), and rings and open blocks of any length."""
    grown = sequence_bytes(CFG, MAC, 1_048_576) - sequence_bytes(CFG, MAC, 1_048_576 - 1280)
    assert grown == 1280 * 6880
    rings = sequence_bytes(CFG, MAC, 131_072) - 131_072 * 6880
    assert rings == pytest.approx(378e6, rel=2e-3)
    assert sequence_bytes(CFG, named("h200"), 131_072) == cache_bytes(CFG, 131_072)
    grown = cache_read_bytes(CFG, 1_048_576, "bf16") / cache_read_bytes(CFG, 1_048_576)
    assert 3 < grown < 4  # nearly all are index rows: 256 bytes of 68


def test_the_plan_of_a_mac_counts_them(run: Any) -> None:
    report = make_report(Model("flash", CFG), MAC, 131_072)
    want = sequence_bytes(CFG, MAC, 131_072)
    assert {one["cache_bytes"] for one in report["recipes"]} == {want}
    shown = {one["context"]: one["bytes"] for one in report["model"]["cache"]}
    assert shown[131_072] == want
    assert report["model"]["cache_rows"] == "bf16"
    q2 = fit(CFG, MAC, RECIPES["q2_K_L"], 8192)
    left = MAC.gpu_limit - q2.weights.total - estimate.working_bytes(MAC)
    most = q2.largest_context
    assert sequence_bytes(CFG, MAC, most) <= left < sequence_bytes(CFG, MAC, most + 128)
    status, out, _ = run("plan", "--machine", "m4max-128")
    assert status == 0
    assert "bf16 rows: 8,192 tokens 434.3 MB" in " ".join(out.split())


def test_slots_of_a_mac_are_counted_so() -> None:
    need = need_of_recipe(CFG, "q2", 262_144)
    weights, each = need.others + need.experts, held_beside(CFG, 262_144, 1024, backend="mlx")
    free = weights + need.reserve + need.working(1024) + 3 * each  # 80 % are for slots

    def slots(name: str) -> int:
        be = SimpleNamespace(name=name, free_memory=lambda: free, max_chunk=1024)
        return default_slots(be, need, weights)

    assert (slots("mlx"), slots("cuda")) == (2, FEW)


@pytest.mark.parametrize("machine", ["m4max-128", "2x5090", "h200"])
def test_a_prompt_of_one_token_takes_a_decoded_token_s_time(machine: str, run: Any) -> None:
    status, out, _ = run("plan", "--machine", machine, "--context", "1")
    assert status == 0
    assert "with 1 token of context" in out
    one, some, many = (fit(CFG, named(machine), RECIPES["q2"], n) for n in (1, 64, 8192))
    assert one.prefill is not None
    assert some.prefill is not None
    assert many.prefill is not None
    assert one.prefill == pytest.approx(one.decode)
    assert one.prefill < some.prefill < many.prefill
