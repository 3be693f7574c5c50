"""The checks of `train_demo.py --smoke`: a small model through every step, on a CPU."""

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import demo_quantize as quantize
import numpy as np
import torch
from demo_files import decoded, export
from demo_model import set_topk
from demo_report import windows
from demo_shape import OFFICIAL, build

from ds4.config import Config
from ds4.quant import formats
from ds4.weights.checkpoint import Checkpoint


def shrink(given: argparse.Namespace) -> dict[str, Any]:
    """A config that is small but has every branch; sets the options to match."""
    given.steps, given.minutes, given.device = given.steps or 12, None, "cpu"
    given.batch, given.length, given.every = 4, 128, 5
    given.prompts, given.valid_windows, given.heldout_windows = ("Once upon a time",), 4, 4
    return OFFICIAL | {
        "hidden_size": 128,
        "index_n_heads": 8,
        "index_topk": 8,
        "moe_intermediate_size": 64,
        "n_routed_experts": 8,
        "q_lora_rank": 64,
        "sliding_window": 16,
    }


def check(run: Any, folder: Path) -> None:
    _rounding()
    _file(run, folder)
    _equal_functions(run)
    _gradients(run)
    print("all checks passed")


def _rounding() -> None:
    """Fake quantization equals ds4.quant.formats bit for bit, ties and extremes included."""
    random = np.random.default_rng(0)
    for scale in (1e-6, 0.02, 1.0, 300.0):
        w = (random.standard_normal((200, 384)) * scale).astype(np.float32)
        w[:, :64] = np.round(w[:, :64] / scale * 8) / 8 * scale  # ties
        w[3:5] = 0
        both = {
            "mxfp4": formats.decode_mxfp4(*formats.encode_mxfp4(w)),
            "fp8": formats.decode_fp8(*formats.encode_fp8(w)),
            "bf16": formats.decode_bf16(formats.encode_bf16(w)),
        }
        for kind, expected in both.items():
            found = quantize.ROUNDERS[kind](torch.from_numpy(w)).numpy()
            _need(found.view(np.uint32), expected.view(np.uint32), f"rounding to {kind}")


def _file(run: Any, folder: Path) -> None:
    """The exported file holds exactly the weights that training saw, and fits its config."""
    config = Config.from_file(folder / "config.json")
    Checkpoint(folder).check(config)
    training = json.loads((folder / "training.json").read_text("utf-8"))
    assert training["file_bytes"] == (folder / "model.safetensors").stat().st_size
    seen = quantize.weights(run.model, run.switch)
    with tempfile.TemporaryDirectory() as other:
        export(Path(other), run.official, seen)
        back = decoded(Path(other), build(run.official, 0))
    assert back.keys() == seen.keys()
    for name, tensor in seen.items():
        _need(back[name].numpy(), tensor.numpy(), name)


def _equal_functions(run: Any) -> None:
    """The prepared model computes what transformers' own does."""
    plain = build(run.official, 0).eval()
    plain.load_state_dict(quantize.weights(run.model, run.switch))
    ids = windows(run.corpus.heldout, run.given.length, 2)
    run.model.eval()
    run.switch.on, run.attention.collect = True, False
    set_topk(run.model, run.official["index_topk"])
    with torch.no_grad():
        expected = plain(ids, use_cache=False).logits
        with run.attention.installed():
            found = run.model(ids, use_cache=False).logits
    difference = float((found - expected).abs().max())
    assert difference < 1e-4, f"logits differ by {difference}"


def _gradients(run: Any) -> None:
    """The indexers' loss trains the indexers and nothing else."""
    run.model.train()
    run.model.zero_grad(set_to_none=True)
    run.attention.collect = True
    with run.attention.installed():
        run.model(windows(run.corpus.train, run.given.length, 2), use_cache=False)
    run.attention.take().backward()
    for name, parameter in run.model.named_parameters():
        trained = parameter.grad is not None and bool(parameter.grad.any())
        assert trained == (".indexer." in name), f"{name}: trained by the indexers' loss: {trained}"


def _need(found: np.ndarray, expected: np.ndarray, what: str) -> None:
    if not np.array_equal(found, expected):
        raise AssertionError(f"{what}: {int((found != expected).sum())} values differ")
