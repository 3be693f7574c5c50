"""Recipes: every tensor of the real model has the class it should, and as many bits."""

from collections import Counter

import pytest

from ds4.plan.flash import flash
from ds4.quant.recipes import BF16, MXFP4, MXFP8, RECIPES, Format, affine, class_of
from ds4.weights.names import expected


def test_bits_per_weight_count_scales():
    bits = [f.bits_per_weight for f in (affine(2, 128), affine(3, 64), MXFP4, MXFP8, BF16)]
    assert bits == [2.25, 3.5, 4.25, 8.25, 16]
    assert Format("f32", 32, 0).bits_per_weight == 32


def test_recipes_are_named_as_users_know_them():
    assert list(RECIPES) == ["q2", "q2_K_L", "q3_K_S", "q4_K_M", "q5_K_M", "q6_K", "q8_0"]
    assert all(recipe.name == name for name, recipe in RECIPES.items())


def test_every_matrix_has_a_class():
    found = Counter(class_of(name) for name in expected(flash()))
    layers, experts = 43, 43 * 256
    assert found["gate_up"] == 2 * experts
    assert found["down"] == experts
    assert found["dense"] == layers * (5 + 3)
    assert (found["embed"], found["head"]) == (1, 1)
    assert found["compress"] == 41 * 2 + 21 * 4


@pytest.mark.parametrize(
    "name",
    [
        "norm.weight",
        "hc_head_fn",
        "layers.7.attn_norm.weight",
        "layers.7.hc_attn_fn",
        "layers.7.attn.attn_sink",
        "layers.7.attn.q_norm.weight",
        "layers.7.attn.compressor.ape",
        "layers.7.attn.compressor.norm.weight",
        "layers.7.ffn.gate.weight",
        "layers.7.ffn.gate.bias",
        "layers.0.ffn.gate.tid2eid",
        "layers.7.ffn.experts.3.w1.scale",
        "mtp.2.markov_head.markov_w1",
        "something.else.weight",
    ],
)
def test_what_stays_as_shipped(name):
    assert all(recipe.format_of(name) is None for recipe in RECIPES.values())


def test_formats_of_a_mixed_recipe():
    q2 = RECIPES["q2"].format_of
    assert q2("layers.42.ffn.experts.255.w3.weight") == affine(2, 128)
    assert q2("layers.42.ffn.experts.255.w2.weight") == affine(2, 64)
    assert q2("mtp.0.ffn.experts.3.w1.weight") == affine(2, 128)
    assert all(q2(f"mtp.0.{name}.weight") is None for name in ("attn.wo_a", "e_proj", "main_proj"))
    assert q2("layers.3.ffn.shared_experts.w2.weight") == affine(6, 64)
    assert (q2("embed.weight"), q2("head.weight")) == (affine(4), affine(6))
    assert q2("layers.2.attn.indexer.compressor.wgate.weight") == affine(8)


@pytest.mark.parametrize("recipe", ["q4_K_M", "q5_K_M", "q6_K", "q8_0"])
def test_native_experts_are_never_quantized_again(recipe):
    for matrix in ("w1", "w2", "w3"):
        name = f"layers.5.ffn.experts.0.{matrix}.weight"
        assert RECIPES[recipe].format_of(name) == MXFP4
        assert RECIPES[recipe].for_experts("fp4").format_of(name) == MXFP4


def test_other_experts_get_the_bits_of_the_name():
    name = "layers.5.ffn.experts.0.w2.weight"
    for dtype, last in (("fp8", MXFP8), ("bfloat16", affine(8))):
        got = [r.for_experts(dtype).format_of(name) for r in RECIPES.values()]
        assert got[:3] == [RECIPES[r].down for r in ("q2", "q2_K_L", "q3_K_S")]
        assert got[3:] == [affine(4), affine(5), affine(6), last]


def test_groups_shrink_to_fit_small_models():
    name = "layers.5.ffn.experts.0.w1.weight"
    q2 = RECIPES["q2"]
    assert q2.format_of(name, 4096) == affine(2, 128)
    assert q2.format_of(name, 192) == affine(2, 64)
    assert q2.format_of(name, 96) == affine(2, 32)
    assert q2.format_of(name, 80) is None
    assert RECIPES["q8_0"].format_of(name, 80) is None
    assert RECIPES["q8_0"].format_of("head.weight", 80) == BF16
