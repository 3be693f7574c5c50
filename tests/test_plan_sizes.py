"""Sizes of the real model: weights of every recipe, caches, operations."""

from dataclasses import replace

import pytest

from ds4.loader import find_model
from ds4.plan.flash import flash, flash_fields
from ds4.plan.report import open_model
from ds4.plan.sizes import (
    cache_bytes,
    cache_read_bytes,
    drafter_bytes,
    parameters,
    prefill_flops,
    state_bytes,
    weight_sizes,
)
from ds4.quant.recipes import RECIPES
from ds4.weights import Checkpoint
from tests.fixtures import flash_config

CFG = flash()
GIB = 2**30

# GiB, computed apart from this code from the parameters of each class
SIZES = {
    "q2": 80.9,
    "q2_K_L": 88.9,
    "q3_K_S": 110.4,
    "q4_K_M": 142.0,
    "q5_K_M": 142.8,
    "q6_K": 144.2,
    "q8_0": 145.7,
}
EXPERT_BITS = {"q2": (2.25, 2.5), "q2_K_L": (2.25, 3.25), "q3_K_S": (3.25, 3.25)}


def test_the_packaged_config_is_the_real_one():
    fields = flash_fields()
    assert {k: fields[k] for k in flash_config()} == flash_config()


@pytest.mark.parametrize("recipe", RECIPES)
def test_sizes_of_every_recipe(recipe):
    size = weight_sizes(CFG, RECIPES[recipe]).total / GIB
    assert size == pytest.approx(SIZES[recipe], rel=0.005)


@pytest.mark.parametrize("recipe", RECIPES)
def test_sizes_with_160_experts(recipe):
    gate_up, down = EXPERT_BITS.get(recipe, (4.25, 4.25))
    dropped = (184.68e9 * gate_up + 92.34e9 * down) / 8 * 96 / 256
    pruned = weight_sizes(replace(CFG, n_routed_experts=160), RECIPES[recipe])
    assert pruned.total == pytest.approx(SIZES[recipe] * GIB - dropped, rel=0.005)


def test_the_model_as_shipped_to_the_byte():
    assert parameters(CFG) == 284_332_240_471
    shipped = weight_sizes(CFG)
    assert shipped.total == 156_015_698_140
    assert shipped.experts == 147_169_738_752
    assert shipped.token == pytest.approx(11.218e9, rel=1e-3)
    pruned = replace(CFG, n_routed_experts=160)
    assert parameters(pruned) == pytest.approx(180.4e9, rel=1e-3)
    assert weight_sizes(pruned).total == pytest.approx(100.8e9, rel=1e-3)


def test_lossless_is_never_larger_than_expected_of_other_experts():
    for dtype, low, high in (("fp8", 8, 8.3), ("bf16", 8, 8.6)):
        sizes = weight_sizes(replace(CFG, expert_dtype=dtype), RECIPES["q8_0"])
        assert low < sizes.experts * 8 / 277.025e9 < high


def test_the_demo_as_shipped_is_its_file():
    demo = open_model("demo")
    checkpoint = Checkpoint(find_model("demo"))
    assert weight_sizes(demo.cfg).total == checkpoint.check(demo.cfg)
    assert demo.stored_bytes >= checkpoint.check(demo.cfg)


def test_cache_sizes():
    assert cache_bytes(CFG, 8192) == pytest.approx(32.0e6, rel=2e-3)
    assert cache_bytes(CFG, 131_072) == pytest.approx(463e6, rel=1e-3)
    assert cache_bytes(CFG, 1_048_576) == pytest.approx(3682e6, rel=1e-3)
    grown = cache_bytes(CFG, 1_048_576) - cache_bytes(CFG, 1_048_576 - 1280)
    assert round(grown / 1280) == 3509
    assert state_bytes(CFG) == pytest.approx(12.2e6, rel=1e-2)
    read = [cache_read_bytes(CFG, n) / 1e6 for n in (8192, 131_072, 1_048_576)]
    assert read == pytest.approx([13.1, 68, 479], rel=5e-3)


def test_operations_of_a_prompt():
    assert prefill_flops(CFG, 8192) == pytest.approx(27.9e9, rel=2e-3)


def test_drafters_are_as_large_as_they_were_counted() -> None:
    """Against bytes counted apart from this code from the releases' tensor lists."""
    assert drafter_bytes(CFG, "mtp") == 3_593_787_756
    assert drafter_bytes(CFG, "dspark") == 10_862_838_300
