"""Synthetic weights: the same bytes on every machine, sane values, layers that share."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from ds4.backends.cuda import qmatrix
from ds4.backends.cuda.synthetic import device_parts
from ds4.backends.cuda.weights import dense, pack

from ds4.backend import open_backend
from ds4.check import small_config
from ds4.cli import main
from ds4.errors import ConfigError
from ds4.loader import Synthetic
from ds4.plan.flash import flash
from ds4.quant.recipes import RECIPES
from ds4.runner import Runner
from ds4.weights import load_weights
from ds4.weights import synthetic_tensor as st
from ds4.weights.synthetic import Popularity, Routing, SyntheticCheckpoint, shared_layers
from ds4.weights.synthetic_tensor import Description, SyntheticTensor

FORMATS = [
    ("f32", 0, 0),
    ("bf16", 0, 0),
    ("fp8", 0, 0),
    ("mxfp4", 0, 0),
    ("mxfp8", 0, 0),
    *(("affine", bits, group) for bits in (2, 3, 4, 5, 6, 8) for group in (64, 128)),
]


@pytest.mark.parametrize(("kind", "bits", "group"), FORMATS)
def test_every_format_is_the_same_anywhere(
    kind: str, bits: int, group: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(st, "PIECE", 1 << 12)  # several pieces, and a short last one
    tensor = SyntheticTensor(Description(kind, (2, 131, 256), 5, 256**-0.5, 0, bits, group))
    here = [tensor.data, tensor.scales, tensor.biases]
    there = device_parts(tensor, "cpu")
    for ours, made in zip(here, there, strict=True):
        assert (ours is None) == (made is None)
        if ours is not None:
            assert ours.tobytes() == made.numpy().tobytes()
    assert tensor.nbytes == sum(x.nbytes for x in here if x is not None)
    values = tensor.decode()
    assert values.shape == tensor.shape == (2, 131, 256)
    assert 0.66 < values.std() * 16 < 1.5
    assert abs(values.mean()) * 16 < 0.02
    assert abs(np.corrcoef(values[0].ravel(), values[1].ravel())[0, 1]) < 0.03
    matrix = qmatrix.from_host(tensor, "cpu")
    exact = 0 if kind not in ("f32", "affine") else 2**-10
    got = qmatrix.dequantize(matrix).numpy()
    np.testing.assert_allclose(got, values, rtol=exact, atol=exact / 64)
    if kind != "fp8":  # whose blocks do not divide 131 rows: pack expects a checkpoint's
        packed = pack(tensor, "cpu")
        np.testing.assert_array_equal(dense(packed).numpy(), values)


def test_equal_descriptions_are_equal_tensors() -> None:
    one = Description("mxfp4", (4, 32), 1, 0.1)
    assert SyntheticTensor(one) == SyntheticTensor(replace(one))
    assert len({SyntheticTensor(one), SyntheticTensor(replace(one, seed=2))}) == 2
    assert not np.array_equal(SyntheticTensor(one).data, SyntheticTensor(replace(one, seed=2)).data)


@pytest.mark.parametrize("recipe", [None, *RECIPES])
def test_a_model_of_every_recipe_runs(recipe: str | None) -> None:
    cfg = small_config()
    source = SyntheticCheckpoint(cfg, recipe=None if recipe is None else RECIPES[recipe])
    logits = []
    for backend in ("reference", "torch"):
        be = open_backend(backend, "cpu", "exact")
        runner = Runner(be, cfg, load_weights(be, cfg, source), context=64)
        logits.append(be.download(runner.run({0: list(range(40))}, every_row=True)))
    assert 0.3 < logits[0].std() < 3
    np.testing.assert_allclose(logits[0], logits[1], atol=1e-3 * np.abs(logits[0]).max())


def test_shared_layers_are_of_one_kind_and_loaded_once() -> None:
    cfg = flash()
    same = shared_layers(cfg, 7)
    assert [same[layer] for layer in range(11)] == [0, 1, 2, 3, 4, 5, 6, 3, 4, 5, 6]
    for layer, other in same.items():
        assert cfg.compress_ratios[layer] == cfg.compress_ratios[other]
        assert (layer < 3) == (other < 3)
    with pytest.raises(ConfigError, match="at least 4 "):
        shared_layers(cfg, 3)
    small = replace(small_config(), num_hash_layers=0)
    be = open_backend("cuda", "cpu")
    layers = load_weights(be, small, SyntheticCheckpoint(small, unique_layers=3)).layers
    assert layers[3].attn.wq_a is layers[1].attn.wq_a
    assert layers[3].ffn.experts.w2 is layers[1].ffn.experts.w2
    assert layers[2].attn.wq_a is not layers[1].attn.wq_a


def test_progress_ends_at_the_bytes_of_all() -> None:
    cfg = small_config()
    seen = []
    load_weights(
        open_backend("cuda", "cpu"),
        cfg,
        SyntheticCheckpoint(cfg),
        lambda done, total: seen.append((done, total)),
    )
    assert seen[-1][0] == seen[-1][1]


def test_skewed_experts_are_as_popular_as_said() -> None:
    popularity = Popularity("skewed", 64, 4)
    shares = popularity.shares(np.random.default_rng(0))
    z = np.random.default_rng(1).standard_normal((4000, 64))
    scores = np.sqrt(np.log1p(np.exp(z))) + popularity.bias(np.random.default_rng(0))
    chosen = np.argsort(-scores, -1)[:, :4]
    table = popularity.table(np.random.default_rng(0), 4096)
    for picks in (chosen, table):
        seen = np.bincount(picks.ravel(), minlength=64) / len(picks)
        assert np.corrcoef(seen, shares)[0, 1] > 0.97
        assert seen.max() > 8 * seen.min()
    assert all(len(set(row)) == 4 for row in table.tolist())
    assert table.shape == (4096, 4)
    uniform = Popularity("uniform", 64, 4).table(np.random.default_rng(0), 4096)
    assert np.bincount(uniform.ravel()).min() > 0.7 * 4096 * 4 / 64


@pytest.mark.parametrize("routing", ["uniform", "skewed"])
def test_a_token_may_have_all_experts(routing: Routing) -> None:
    cfg = small_config()
    cfg = replace(cfg, num_experts_per_tok=cfg.n_routed_experts)
    be = open_backend("reference", "cpu", "exact")
    weights = load_weights(be, cfg, SyntheticCheckpoint(cfg, routing=routing))
    logits = be.download(Runner(be, cfg, weights, context=64).run({0: [1, 2, 3]}, every_row=True))
    assert 0.3 < logits.std() < 3


def test_a_deep_model_stays_finite() -> None:
    """As deep as the real one, of its kinds of layers, narrower."""
    cfg = replace(
        small_config(),
        num_hidden_layers=43,
        compress_ratios=tuple([0, 0] + [4, 8] * 20 + [4]),
        num_hash_layers=3,
    )
    be = open_backend("cuda", "cpu")
    source = SyntheticCheckpoint(cfg, recipe=RECIPES["q8_0"], unique_layers=7)
    sizes: list[float] = []
    post = be.hc_post

    def watched(x: torch.Tensor, h: torch.Tensor, mix: object) -> torch.Tensor:
        out = post(x, h, mix)
        sizes.append(float(out.std()))
        return out

    be.hc_post = watched  # type: ignore[method-assign]
    runner = Runner(be, cfg, load_weights(be, cfg, source), context=64)
    logits = be.download(runner.run({0: list(range(48))}, every_row=True))
    assert len(sizes) == 86
    assert np.isfinite(logits).all()
    assert max(sizes) < 100


def test_the_command_line_makes_a_model(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(*options: str) -> tuple[object, str, str]:
        monkeypatch.setattr("sys.argv", ["ds4", "generate", "Once", "-b", "cuda", *options])
        with pytest.raises(SystemExit) as end:
            main()
        return end.value.code, *capsys.readouterr()

    made = "--synthetic", "demo", "--device", "cpu", "-n", "3", "--json"
    status, out, _ = run(*made, "--recipe", "q2", "--unique-layers", "all")
    report = json.loads(out)
    assert (status, report["model"], len(report["tokens"])) == (0, "demo", 3)
    assert "no recipe is called 'q9'" in run(*made, "--recipe", "q9")[2]
    assert run(*made, "--unique-layers", "many")[0] == 2
    assert "layer 2 is the first of its kind" in run(*made, "--unique-layers", "1")[2]


def test_fewer_layers() -> None:
    assert Synthetic("flash", layers=7).config().compress_ratios == (0, 0, 4, 128, 4, 128, 4)
    assert Synthetic("tiny", layers=1).config().num_hash_layers == 1
    with pytest.raises(ConfigError, match="from 1 to 43 for flash, not 44"):
        Synthetic("flash", layers=44).config()
