"""What trains the demo's drafters computes what tests/draft_oracle.py has of them."""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ds4.config import Config
from tests import draft_oracle

sys.path.insert(0, str(Path(__file__).parents[1] / "scripts"))
import demo_files
import demo_quantize
import train_demo_dspark
import train_demo_mtp
from demo_drafter import Said
from demo_model import prepare
from demo_shape import OFFICIAL, build

SMALL: dict[str, Any] = OFFICIAL | {
    "hidden_size": 128,
    "moe_intermediate_size": 64,
    "n_routed_experts": 8,
    "q_lora_rank": 64,
    "vocab_size": 128,
    "sliding_window": 16,
    "num_hidden_layers": 4,
    "compress_ratios": [0, 0, 4, 32],
}
AT = 37  # more than a window of tokens come before


@pytest.fixture(scope="module")
def said() -> Iterator[Said]:
    """What a random model makes of a text, with the functions that training puts in its place."""
    model, streams = build(SMALL, 0).eval(), list[torch.Tensor]()
    for layer in model.model.layers:
        layer.register_forward_hook(lambda _, __, out: streams.append(out))
    ids = torch.from_numpy(np.random.default_rng(0).integers(3, SMALL["vocab_size"], (1, 60)))
    with prepare(model, 0.0, False).installed(), torch.no_grad():
        logits = model(ids, use_cache=False).logits
        yield Said(model, ids, logits, streams)


def ready(module: Any, said: Said, added: int, more: dict[str, Any]) -> tuple[Any, Config, Any]:
    """A random block, its config, and the weights under the checkpoint's names."""
    switch = demo_quantize.Switch()
    switch.on = True
    block = module.Block(SMALL, 1, switch).eval()
    prepare(block, 0.0, False)
    ratios = [*SMALL["compress_ratios"], *[0] * added]
    cfg = Config.from_dict(
        SMALL | more | {"compress_ratios": ratios, "num_nextn_predict_layers": 1}
    )
    weights = {name: np.asarray(x, np.float64) for name, x in block.tensors().items()}
    weights["embed.weight"] = said.model.get_input_embeddings().weight.numpy()
    weights["head.weight"] = said.model.get_output_embeddings().weight.numpy()
    return block, cfg, weights


def test_mtp(said: Said) -> None:
    block, cfg, w = ready(train_demo_mtp, said, 1, {})
    ids, streams = said.ids[:, : AT + 1], said.streams[-1][:, :AT]
    out = said.head(block.collapsed(block(streams, said.embedded(ids)[:, 1:])))[0, -1]
    want = draft_oracle.mtp(w, cfg, streams[0].numpy(), ids[0].tolist(), 1, False)[0]
    np.testing.assert_allclose(out, want, atol=1e-5)
    assert want.std() > 0.05


def test_dspark(said: Said) -> None:
    more = {
        "dspark_markov_rank": train_demo_dspark.RANK,
        "dspark_noise_token_id": train_demo_dspark.NOISE,
    }
    block, cfg, w = ready(train_demo_dspark, said, 3, more)
    torch.nn.init.normal_(block.confidence.parametrizations.weight.original)
    w |= {name: np.asarray(x, np.float64) for name, x in block.tensors().items()}
    hidden = block(said, torch.tensor([[AT]]))[0, 0]
    base, token = said.head(block.inner.norm(hidden)), int(said.ids[0, AT])
    taps = [said.streams[layer][0, :AT].numpy() for layer in cfg.dspark.target_layers]
    want, sure = draft_oracle.dspark(w, cfg, taps, token, False)
    for place in range(cfg.dspark.block_size):
        row = block.w1(torch.tensor(token))
        np.testing.assert_allclose(base[place] + block.w2(row), want[place], atol=1e-5)
        told = block.confidence(torch.cat([hidden[place], row]))
        np.testing.assert_allclose(told, sure[place], rtol=1e-4)
        token = int(want[place].argmax())
    assert want.std() > 0.05


def test_training_has_gradients_everywhere(said: Said) -> None:
    for module in (train_demo_mtp, train_demo_dspark):
        block = module.Block(SMALL, 1, demo_quantize.Switch()).train()
        prepare(block, 0.0, False)
        with torch.enable_grad():
            loss, told = block.losses(said)
            loss.backward()
        assert all(torch.isfinite(x).all() for x in told.values())
        missing = [n for n, p in block.named_parameters() if p.grad is None or not p.grad.any()]
        assert missing == [], missing


def test_the_demo_is_read_as_transformers_has_it() -> None:
    folder = Path(__file__).parents[1] / "ds4" / "demo"
    model = build(OFFICIAL, 0)
    model.load_state_dict(demo_files.decoded(folder, model))
