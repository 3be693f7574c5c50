"""Checkpoints under transformers' names."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ds4.config import Config
from ds4.weights import Checkpoint
from ds4.weights.names import expected, to_hf, to_official
from tests.fixtures import (
    official_fixture,
    official_tensors,
    random_official_state,
    small_config,
    write_folder,
)
from tests.loading import loaded, raw_tensors, same


def test_official_names_and_transformers_names_map_both_ways() -> None:
    names = list(expected(Config.from_dict(small_config())))
    names += [n.replace(".weight", ".scale") for n in names if ".wq_" in n or ".experts." in n]
    assert len({to_hf(name) for name in names}) == len(names)
    for name in names:
        assert to_official(to_hf(name)) == name
        assert to_official(name) == name
    assert to_hf("layers.2.attn.wq_a.scale") == "model.layers.2.self_attn.q_a_proj.weight_scale_inv"


def stacked_as_transformers(cfg: dict[str, Any], tensors: dict[str, Any]) -> dict[str, Any]:
    """Official tensors under transformers' names, each layer's experts stacked."""
    out = {to_hf(n): t for n, t in tensors.items() if ".ffn.experts." not in n}
    for layer in range(cfg["num_hidden_layers"]):
        for leaf, suffix in (("weight", ""), ("scale", "_scale_inv")):
            for proj, matrices in (("gate_up_proj", ("w1", "w3")), ("down_proj", ("w2",))):
                path = f"layers.{layer}.ffn.experts"
                each = [
                    tensors[f"{path}.{e}.{w}.{leaf}"]
                    for e in range(cfg["n_routed_experts"])
                    for w in matrices
                    if f"{path}.{e}.{w}.{leaf}" in tensors
                ]
                if each:
                    dtype, (rows, columns), _ = each[0]
                    shape = (cfg["n_routed_experts"], rows * len(matrices), columns)
                    data = b"".join(part for _, _, part in each)
                    out[f"model.layers.{layer}.mlp.experts.{proj}{suffix}"] = (dtype, shape, data)
    return out


def test_transformers_names_with_stacked_experts(tmp_path: Path) -> None:
    cfg = small_config()
    official_fixture(tmp_path / "official")
    tensors = official_tensors(random_official_state(cfg))
    write_folder(tmp_path / "hf", cfg, stacked_as_transformers(cfg, tensors))
    assert Checkpoint(tmp_path / "hf").extras == ()
    same(loaded(tmp_path / "official"), loaded(tmp_path / "hf"))


def test_what_save_pretrained_writes(tmp_path: Path) -> None:
    pytest.importorskip("torch")
    from tests import oracle

    model = oracle.make(oracle.TINY)
    model.save_pretrained(tmp_path)
    assert any(".attn.norm." in name for name in raw_tensors(tmp_path / "model.safetensors"))
    assert Checkpoint(tmp_path).extras == ()
    be = loaded(tmp_path).decoded()
    state = {name: x.numpy() for name, x in model.state_dict().items()}
    wide = oracle.TINY["moe_intermediate_size"]
    for layer in range(7):
        hf, mine = f"model.layers.{layer}.", f"layers.{layer}."
        for theirs, ours in (
            ("self_attn.kv_norm.weight", "attn.kv_norm"),
            ("self_attn.sinks", "attn.attn_sink"),
            ("self_attn.q_b_proj.weight", "attn.wq_b"),
            ("attn_hc.fn", "hc_attn_fn"),
            ("mlp.gate.weight", "ffn.gate"),
            ("mlp.experts.down_proj", "ffn.experts.w2"),
        ):
            np.testing.assert_array_equal(be[mine + ours], state[hf + theirs], err_msg=ours)
        gate_up = state[hf + "mlp.experts.gate_up_proj"]
        np.testing.assert_array_equal(be[mine + "ffn.experts.w1"], gate_up[:, :wide])
        np.testing.assert_array_equal(be[mine + "ffn.experts.w3"], gate_up[:, wide:])
        if layer < 3:
            np.testing.assert_array_equal(
                be[mine + "ffn.gate.tid2eid"], state[hf + "mlp.gate.tid2eid"]
            )
    for theirs, ours in (("kv_proj", slice(0, 32)), ("gate_proj", slice(32, 64))):
        want = state[f"model.layers.4.self_attn.compressor.indexer.{theirs}.weight"]
        np.testing.assert_array_equal(be["layers.4.attn.indexer.compressor.wkv_gate"][ours], want)
    np.testing.assert_array_equal(be["head"], state["lm_head.weight"])
