"""Fewer experts a layer: what stays, how it is numbered, and that every backend runs it."""

import json
import shutil
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

import ds4
from ds4.cli import app
from ds4.config import Config
from ds4.errors import QuantizeError
from ds4.eval.score import Reference, reader, score
from ds4.eval.variants import Variant
from ds4.eval.windows import cut_for
from ds4.loader import find_model
from ds4.quant.calibration import Calibration, calibrate
from ds4.quant.inputs import LayerInputs
from ds4.quant.pruning import PrunedCheckpoint, reap
from ds4.quant.quantize import quantize_checkpoint
from ds4.runner import Runner
from ds4.weights import Checkpoint, load_weights
from ds4.weights.names import expected
from ds4.weights.verify import verify
from tests import oracle
from tests.fixtures import (
    flash_config,
    official_fixture,
    official_tensors,
    random_official_state,
    small_config,
    write_folder,
)
from tests.loading import Keep, loaded

SHAPE: dict[str, Any] = {
    "num_hidden_layers": 3,
    "num_hash_layers": 1,
    "compress_ratios": [0, 4, 8, 0],
    "vocab_size": 320,
    "num_experts_per_tok": 3,
}
LEFT = 5  # of 8 experts
IDS = np.random.default_rng(5).integers(0, 320, 40).tolist()


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    official_fixture(folder, seed=7, **SHAPE)
    return folder


@pytest.fixture(scope="module")
def saliency() -> dict[int, np.ndarray]:
    return dict(enumerate(np.random.default_rng(1).random((3, 8))))


@pytest.fixture(scope="module")
def pruned(whole: Path, saliency: dict[int, np.ndarray], tmp_path_factory: Any) -> Path:
    folder = tmp_path_factory.mktemp("pruned")
    quantize_checkpoint(whole, folder, "q8_0", experts=LEFT, saliency=saliency)
    return folder


def view(folder: Path) -> PrunedCheckpoint:
    return PrunedCheckpoint(Checkpoint(folder), Config.from_file(folder / "config.json"), LEFT)


def best(saliency: np.ndarray) -> list[int]:
    return sorted(sorted(range(8), key=lambda e: -saliency[e])[:LEFT])


# what stays


def test_the_most_salient_stay_bit_for_bit(
    whole: Path, pruned: Path, saliency: dict[int, np.ndarray]
) -> None:
    before, after = Checkpoint(whole), Checkpoint(pruned)
    cfg = Config.from_file(pruned / "config.json")
    assert cfg.n_routed_experts == LEFT
    shapes = expected(Config.from_file(whole / "config.json"))
    for layer in range(3):
        kept = best(saliency[layer])
        for new, old in enumerate(kept):
            for w in ("w1", "w2", "w3"):
                path = f"layers.{layer}.ffn.experts"
                name, source = f"{path}.{new}.{w}.weight", f"{path}.{old}.{w}.weight"
                a, b = after.read(name, shapes[source]), before.read(source, shapes[source])
                np.testing.assert_array_equal(a.data, b.data)
                np.testing.assert_array_equal(a.scales, b.scales)
        for leaf in ("weight", "bias") if layer else ("weight",):
            name = f"layers.{layer}.ffn.gate.{leaf}"
            rows = before.read(name, shapes[name]).decode()[kept]
            np.testing.assert_array_equal(after.read(name, expected(cfg)[name]).decode(), rows)


def test_a_routing_table_names_what_is_left_of_its_row(
    whole: Path, pruned: Path, saliency: dict[int, np.ndarray]
) -> None:
    name, shape = "layers.0.ffn.gate.tid2eid", (320, 3)
    before = Checkpoint(whole).read(name, shape).data
    after = Checkpoint(pruned).read(name, shape, LEFT).data
    kept = best(saliency[0])
    ranked = sorted(kept, key=lambda e: -saliency[0][e])
    lost = 0
    for old, new in zip(before, after, strict=True):
        left = [e for e in ranked if e in old]
        turns = cycle(left or ranked)
        want = [e if e in kept else next(turns) for e in old]
        assert [kept[e] for e in new] == want
        lost += not left
    assert 0 < lost < 10  # both kinds of rows occur


def test_the_view_and_the_folder_are_one(
    whole: Path, pruned: Path, saliency: dict[int, np.ndarray]
) -> None:
    seen, keep = view(whole), Keep()
    seen.keep(saliency)
    load_weights(keep, seen.cfg, seen)
    for name, value in loaded(pruned).decoded().items():
        np.testing.assert_array_equal(value, keep.decoded()[name], err_msg=name)
    assert verify(pruned, full=True).ok
    fields = json.loads((pruned / "config.json").read_text())
    assert fields["reap_pruning"] == {"original_n_routed_experts": 8}


def test_importance_and_inputs_follow_their_experts(
    whole: Path, saliency: dict[int, np.ndarray]
) -> None:
    names = [f"layers.{layer}.ffn.experts.{e}.w2.weight" for layer in range(3) for e in range(8)]
    given = {name: np.full(4, i) for i, name in enumerate(names)} | {"head.weight": np.ones(4)}

    class Whole:
        def layer(self, layer: int) -> Any:
            return LayerInputs(np.zeros((8, 2)), np.arange(8)[:, None], np.ones((8, 1)))

    found, inputs = view(whole).keep(saliency, given, Whole())  # type: ignore[arg-type]
    assert inputs is not None
    assert len(found) == 3 * LEFT + 1
    for layer in range(3):
        for new, old in enumerate(best(saliency[layer])):
            assert found[f"layers.{layer}.ffn.experts.{new}.w2.weight"][0] == 8 * layer + old

    kept = best(saliency[1])
    want = [[kept.index(e) if e in kept else -1] for e in range(8)]
    assert inputs.layer(1).ids.tolist() == want


def test_reap_is_a_mean_that_few_tokens_cannot_make_large() -> None:
    counts, total = np.array([10_000, 1_000, 1, 0]), np.array([10_000.0, 2_000.0, 50.0, 0.0])
    found = reap(Calibration(1, {0: counts}, {0: total}, {}))[0]
    assert np.argsort(-found).tolist() == [1, 0, 2, 3]


# it runs


def test_every_backend_runs_it_as_transformers_does(pruned: Path, backend: str) -> None:
    """Rows that name an expert twice count it twice: so does transformers."""
    table = Checkpoint(pruned).read("layers.0.ffn.gate.tid2eid", (320, 3)).data
    assert any(len(set(table[token])) < 3 for token in IDS)
    want = oracle.logits(oracle.from_checkpoint(pruned), IDS)
    found = ds4.load(pruned, backend, "cpu", cache="exact").logits(IDS)
    np.testing.assert_allclose(found, want, atol=5e-4)


@pytest.mark.parametrize(("left", "ratios"), [(5, 3), (4, 4), (5, 6)])
def test_pruned_checkpoints_of_others_load(left: int, ratios: int, tmp_path: Path) -> None:
    """Ratios for main layers only or three drafter stages too, no MTP, a note, doubled experts."""
    cfg = small_config(**SHAPE, n_routed_experts=left, num_nextn_predict_layers=0)
    cfg["compress_ratios"] = [0, 4, 8, 0, 0, 0][:ratios]
    cfg["reap_pruning"] = {"method": "reap", "prune_ratio": 0.375, "kept": [[1, 2]]}
    state = random_official_state(cfg, seed=3)
    state["layers.0.ffn.gate.tid2eid"][:, 1] = state["layers.0.ffn.gate.tid2eid"][:, 0]
    write_folder(tmp_path, cfg, official_tensors(state))
    want = oracle.logits(oracle.from_checkpoint(tmp_path), IDS)
    for backend in ("reference", "mlx", "torch"):
        found = ds4.load(tmp_path, backend, "cpu", cache="exact").logits(IDS)
        np.testing.assert_allclose(found, want, atol=5e-4)


@pytest.mark.parametrize(("experts", "billions"), [(160, 180.4), (128, 145.8)])
@pytest.mark.parametrize("ratios", [43, 44, 46])
def test_configs_of_known_pruned_releases(experts: int, billions: float, ratios: int) -> None:
    given = flash_config() | {"n_routed_experts": experts, "num_nextn_predict_layers": 0}
    given["compress_ratios"] = (given["compress_ratios"] + [0, 0])[:ratios]
    cfg = Config.from_dict(given)
    tables = 3 * 129280 * 6  # ids, not parameters
    count = sum(int(np.prod(shape)) for shape in expected(cfg).values()) - tables
    assert count / 1e9 == pytest.approx(billions, abs=0.1)


# chosen by a text


@pytest.fixture(scope="module")
def reader_of_text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights with the demo's tokenizer."""
    folder = tmp_path_factory.mktemp("reader")
    shape = {"num_hidden_layers": 2, "compress_ratios": [0, 4, 0], "vocab_size": 4096}
    official_fixture(folder, seed=2, num_hash_layers=1, **shape)
    shutil.copy(find_model("demo") / "tokenizer.json", folder)
    return folder


def test_a_text_chooses_and_weighs(reader_of_text: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text((find_model("demo") / "calibration.txt").read_text("utf-8")[:2500])
    made = tmp_path / "made"
    done = quantize_checkpoint(
        reader_of_text, made, "q2", "gptq", calibrate=text, experts=6, backend="cuda", device="cpu"
    )
    assert done.tokens > 500
    llm = ds4.load(reader_of_text, "cuda", "cpu", context=1)
    assert llm.tokenizer is not None
    ids = [llm.tokenizer.bos_id, *llm.tokenizer.encode(text.read_text())]
    wanted = PrunedCheckpoint(Checkpoint(reader_of_text), llm.config, 6)
    wanted.keep(reap(calibrate(llm, ids)))
    for layer in range(2):
        name = f"layers.{layer}.ffn.gate.weight"
        rows = Checkpoint(reader_of_text).read(name, (8, 256)).data
        found = Checkpoint(made).read(name, (6, 256)).data
        np.testing.assert_array_equal(found, rows[wanted.kept[layer]])
    shapes = expected(wanted.cfg)
    for name, shape in shapes.items():
        if ".experts." in name:
            here = Checkpoint(made).read(name, shape).decode()
            there = wanted.read(name, shape).decode()
            assert np.square(here - there).mean() < 0.4 * np.square(there).mean(), name
    assert np.isfinite(ds4.load(made, "reference").logits(ids[:20])).all()


def test_the_command_prunes(reader_of_text: Path, tmp_path: Path) -> None:
    text, made = tmp_path / "text.txt", tmp_path / "made"
    text.write_text((find_model("demo") / "calibration.txt").read_text("utf-8")[:1500])
    command = ["quantize", str(reader_of_text), str(made), "-r", "q8_0", "--method", "rtn"]
    without = CliRunner().invoke(app, [*command, "--experts", "5"])
    assert "--calibrate" in str(without.exception)
    done = CliRunner().invoke(app, [*command, "--experts", "5", "--calibrate", str(text)])
    assert done.exit_code == 0, done.output
    assert ds4.load(made, "reference").config.n_routed_experts == 5


# refused


@pytest.mark.parametrize("experts", [2, 9, 0])
def test_numbers_that_cannot_be(whole: Path, experts: int, tmp_path: Path) -> None:
    with pytest.raises(QuantizeError, match=rf"experts must be from 3 .* to 8 .*, not {experts}"):
        quantize_checkpoint(whole, tmp_path / "out", "q8_0", experts=experts, saliency={})


def test_a_choice_needs_its_own_model(
    whole: Path, pruned: Path, saliency: dict[int, np.ndarray], tmp_path: Path
) -> None:
    with pytest.raises(QuantizeError, match="--calibrate"):
        quantize_checkpoint(whole, tmp_path / "a", "q8_0", experts=LEFT)
    for wrong in ({0: np.ones(8)}, {layer: np.ones(6) for layer in range(3)}):
        with pytest.raises(QuantizeError, match="another model"):
            quantize_checkpoint(whole, tmp_path / "b", "q8_0", experts=LEFT, saliency=wrong)
    for other in ({"saliency": {**saliency, 1: -saliency[1]}, "experts": LEFT}, {}):
        with pytest.raises(QuantizeError, match="another model, recipe or method"):
            quantize_checkpoint(whole, pruned, "q8_0", **other)
    again = quantize_checkpoint(whole, pruned, "q8_0", experts=LEFT, saliency=saliency)
    assert again.reused == again.files


def test_reap_costs_less_than_chance_and_frequency_on_the_demo() -> None:
    folder = find_model("demo")
    llm = ds4.load(folder, "cuda", "cpu", context=1)
    assert llm.tokenizer is not None
    text = llm.tokenizer.encode((folder / "calibration.txt").read_text("utf-8"))
    seen = calibrate(llm, text[:1500])
    heldout = (folder / "heldout.txt").read_text("utf-8")
    windows = cut_for(llm, heldout, 500, 1000)
    reference = Reference(reader(llm, windows), windows)
    source, cfg = Checkpoint(folder), llm.config

    def cost(rule: str) -> float:
        chosen = Variant("q8_0", experts=12, rule=rule).saliency(seen)
        assert chosen is not None
        left = PrunedCheckpoint(source, cfg, 12)
        left.keep(chosen)
        weights = load_weights(llm.runner.be, left.cfg, left)
        found = score(Runner(llm.runner.be, left.cfg, weights, 501), windows, reference)
        assert found.mean_kl is not None
        return found.mean_kl

    ours = cost("REAP")
    assert ours < cost("frequency")
    assert ours < (cost("random 0") + cost("random 1")) / 2
