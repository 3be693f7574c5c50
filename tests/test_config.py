"""Config: every field of config.json, checked."""

import json
import math

import numpy as np
import pytest

from ds4.config import Config, Dspark, Yarn
from ds4.errors import ConfigError
from tests.fixtures import flash_config, small_config


def test_the_real_config() -> None:
    cfg = Config.from_dict(flash_config())
    assert cfg.compress_ratios == (0, 0) + (4, 128) * 20 + (4,)
    assert [cfg.compress_ratios.count(ratio) for ratio in (0, 4, 128)] == [2, 21, 20]
    assert cfg.rope_scaling == Yarn(16.0, 65536, 32.0, 1.0)
    assert (cfg.num_hash_layers, cfg.num_experts_per_tok, cfg.expert_dtype) == (3, 6, "fp4")


@pytest.mark.parametrize("extra", [0, 1, 3])
def test_ratios_of_43_44_and_46_entries_are_the_same_model(extra: int) -> None:
    ratios = flash_config()["compress_ratios"][:43] + [0] * extra
    cfg = Config.from_dict(flash_config() | {"compress_ratios": ratios})
    assert cfg == Config.from_dict(flash_config())


def test_entries_past_the_layers_follow_the_drafter_count() -> None:
    ratios = [*flash_config()["compress_ratios"][:43], 0, 0]
    fields = flash_config() | {"compress_ratios": ratios}
    with pytest.raises(ConfigError, match=r"45 entries.*43 or 44 or 46"):
        Config.from_dict(fields)
    cfg = Config.from_dict(fields | {"num_nextn_predict_layers": 2})
    assert len(cfg.compress_ratios) == 43


def test_unknown_keys_and_a_missing_expert_dtype_are_fine() -> None:
    fields = flash_config() | {"reap_pruning": {"kept": 160}, "dspark_block_size": 5}
    del fields["expert_dtype"]
    assert Config.from_dict(fields).expert_dtype == "fp4"


# rotary frequencies


def test_rope_frequencies_of_the_specification() -> None:
    cfg = Config.from_dict(flash_config())
    golden = {
        1: 0.687656,
        8: 0.05,
        16: 0.002265625,
        20: 2.96978e-4,
        24: 1.953125e-5,
        25: 5.37231e-6,
        31: 5.68053e-7,
    }
    for ratio in (4, 128):
        freqs = cfg.rope_freqs(ratio)
        assert freqs.dtype == np.float32
        assert freqs.shape == (32,)
        for k, value in golden.items():
            assert freqs[k] == pytest.approx(value, rel=2e-6)
    plain = [10000 ** (-2 * k / 64) for k in range(32)]
    np.testing.assert_allclose(cfg.rope_freqs(0), plain, rtol=2e-7)


ROPES = [(64, 16, 65536), (64, 4, 64), (8, 4, 64), (16, 2, 4096), (8, 40, 4), (32, 1, 128)]


@pytest.mark.parametrize(("rope", "factor", "length"), ROPES)
def test_rope_frequencies_are_those_of_transformers(rope: int, factor: int, length: int) -> None:
    transformers = pytest.importorskip("transformers")
    modeling = pytest.importorskip("transformers.models.deepseek_v4.modeling_deepseek_v4")
    yarn = {
        "type": "yarn",
        "factor": factor,
        "original_max_position_embeddings": length,
        "beta_fast": 32,
        "beta_slow": 1,
    }
    fields = small_config(qk_rope_head_dim=rope, rope_scaling=yarn)
    cfg = Config.from_dict(fields)
    oracle = transformers.DeepseekV4Config(
        head_dim=128,
        qk_rope_head_dim=rope,
        rope_scaling=dict(yarn),
        max_position_embeddings=factor * length,
        rope_theta=10000.0,
        compress_rope_theta=160000.0,
    )
    rotary = modeling.DeepseekV4RotaryEmbedding(oracle)
    np.testing.assert_array_max_ulp(cfg.rope_freqs(0), rotary.main_inv_freq.numpy(), 1)
    np.testing.assert_array_max_ulp(cfg.rope_freqs(4), rotary.compress_inv_freq.numpy(), 2)


def test_no_yarn() -> None:
    cfg = Config.from_dict(flash_config() | {"rope_scaling": None})
    assert cfg.rope_freqs(4)[31] == pytest.approx(160000 ** (-62 / 64), rel=2e-7)


# the dialect of transformers


def saved_by_transformers(**overrides: object) -> dict:
    transformers = pytest.importorskip("transformers")
    config = transformers.DeepseekV4Config(
        vocab_size=512,
        hidden_size=64,
        num_hidden_layers=7,
        head_dim=32,
        qk_rope_head_dim=8,
        compress_ratios=[0, 0, 4, 128, 4, 128, 4, 0],
        compress_rate_hca=8,
        num_hash_layers=2,
        max_position_embeddings=256,
        rope_scaling=dict(small_config()["rope_scaling"]),
        **overrides,
    )
    return json.loads(config.to_json_string(use_diff=False))


def test_config_as_transformers_saves_it() -> None:
    fields = saved_by_transformers()
    assert "compress_ratios" not in fields
    cfg = Config.from_dict(fields)
    assert cfg.compress_ratios == (0, 0, 4, 8, 4, 8, 4)
    assert (cfg.num_hash_layers, cfg.qk_rope_head_dim) == (2, 8)
    assert cfg.rope_scaling == Yarn(4.0, 64, 32.0, 1.0)
    assert (cfg.rope_theta, cfg.compress_rope_theta) == (10000.0, 160000.0)


def test_rates_of_transformers_beside_compress_ratios() -> None:
    fields = small_config(compress_ratios=[0, 0, 4, 128, 4, 128, 4, 0], compress_rate_hca=8)
    assert Config.from_dict(fields).compress_ratios == (0, 0, 4, 8, 4, 8, 4)


CONTRADICTIONS = [
    ({"compress_ratios": [0, 0, 4, 8, 4, 8, 8]}, "compress_ratios"),
    ({"num_hash_layers": 3}, "num_hash_layers"),
    ({"rope_theta": 5000.0}, "rope_theta"),
    ({"compress_rate_hca": 16}, "heavily_compressed_attention"),
    ({"compress_rates": {"compressed_sparse_attention": 8}}, "compress_rate_csa"),
    ({"mlp_layer_types": ["moe"] + ["hash_moe"] * 2 + ["moe"] * 4}, "mlp_layer_types"),
    ({"layer_types": ["full_attention"] * 7}, "layer_types[0]"),
    (
        {
            "rope_scaling": {
                "type": "yarn",
                "factor": 16,
                **{"original_max_position_embeddings": 64},
            }
        },
        "rope_scaling",
    ),
]


@pytest.mark.parametrize(("change", "field"), CONTRADICTIONS)
def test_contradictions_between_the_dialects(change: dict, field: str) -> None:
    with pytest.raises(ConfigError) as error:
        Config.from_dict(saved_by_transformers() | change, "some/config.json")
    assert str(error.value).startswith("some/config.json: ")
    assert field in str(error.value)


# what is refused


OPTIONAL = {"expert_dtype", "num_nextn_predict_layers", "dspark"}
REQUIRED = sorted(set(Config.__dataclass_fields__) - OPTIONAL)


@pytest.mark.parametrize("field", REQUIRED)
def test_a_missing_field_is_named(field: str) -> None:
    fields = flash_config()
    del fields[field]
    with pytest.raises(ConfigError) as error:
        Config.from_dict(fields, "model/config.json")
    message = str(error.value)
    assert message.startswith(f"model/config.json: {field} is missing; it should be ")
    assert "\n" not in message


RATIOS = flash_config()["compress_ratios"]
BAD = [
    ("vocab_size", 0, "an integer of at least 1"),
    ("vocab_size", "129280", "an integer"),
    ("hidden_size", 4096.0, "an integer"),
    ("num_hidden_layers", True, "an integer"),
    ("num_hidden_layers", 45, "compress_ratios has"),
    ("num_hidden_layers", 10**6, "from 1 to 512"),
    ("n_routed_experts", 10**7, "from 1 to 2048"),
    ("sliding_window", -128, "an integer of at least 1"),
    ("qk_rope_head_dim", 63, "even"),
    ("qk_rope_head_dim", 514, "from 2 to 512"),
    ("index_head_dim", 32, "qk_rope_head_dim (64)"),
    ("o_groups", 7, "a divisor of num_attention_heads x head_dim (32768)"),
    ("num_experts_per_tok", 257, "at most n_routed_experts (256)"),
    ("num_hash_layers", 44, "from 0 to 43"),
    ("num_hash_layers", -1, "from 0 to 43"),
    ("n_shared_experts", 2, "1"),
    ("scoring_func", "sigmoid", '"sqrtsoftplus"'),
    ("topk_method", "greedy", '"noaux_tc"'),
    ("hidden_act", "gelu", '"silu"'),
    ("norm_topk_prob", False, "true"),
    ("num_key_value_heads", 8, "1"),
    ("tie_word_embeddings", True, "false"),
    ("attention_bias", True, "false"),
    ("model_type", "deepseek_v3", '"deepseek_v4"'),
    ("model_type", "deepseek_v4_1", "V4.1"),
    ("hc_eps", 0.0, "a finite number above 0"),
    ("rms_norm_eps", math.nan, "a finite number above 0"),
    ("swiglu_limit", math.inf, "a finite number above 0"),
    ("routed_scaling_factor", "1.5", "a finite number"),
    ("rope_theta", 1, "a finite number above 1"),
    ("compress_rope_theta", 10**400, "a finite number above 1"),
    ("bos_token_id", None, "an integer from 0 to 129279"),
    ("eos_token_id", 129280, "an integer from 0 to 129279"),
    ("rope_scaling", "yarn", "an object"),
    ("rope_scaling", {"type": "linear", "factor": 4}, "rope_scaling: type"),
    ("rope_scaling", {"type": "yarn", "factor": 4}, "original_max_position_embeddings is missing"),
    ("expert_dtype", "int4", "one of fp4"),
    ("quantization_config", {"quant_method": "awq"}, '"fp8"'),
    ("quantization_config", {"weight_block_size": [32, 32]}, "[128, 128]"),
    ("compress_ratios", None, "a list of 43 integers"),
    ("compress_ratios", 4, "a list of 43 integers"),
    ("compress_ratios", RATIOS[:42], "has 42 entries"),
    ("compress_ratios", [*RATIOS, 0], "has 45 entries"),
    ("compress_ratios", [*RATIOS[:43], 4], "compress_ratios[43] is 4; it should be 0"),
    ("compress_ratios", [*RATIOS[:5], -4, *RATIOS[6:]], "compress_ratios[5] is -4"),
    ("compress_ratios", [*RATIOS[:5], 2, *RATIOS[6:]], "compress_ratios[5] is 2"),
    ("compress_ratios", [*RATIOS[:5], "4", *RATIOS[6:]], "compress_ratios[5]"),
    ("compress_ratios", [*RATIOS[:5], 4.0, *RATIOS[6:]], "compress_ratios[5] is 4.0"),
]


@pytest.mark.parametrize(("field", "value", "need"), BAD)
def test_a_bad_value_is_named_with_what_it_should_be(field: str, value: object, need: str) -> None:
    with pytest.raises(ConfigError) as error:
        Config.from_dict(flash_config() | {field: value}, "model/config.json")
    message = str(error.value)
    assert message.startswith("model/config.json: ")
    assert field in message
    assert need in message
    assert "\n" not in message


def test_the_indexer_is_needed_by_csa_layers_only() -> None:
    fields = small_config(compress_ratios=[0, 0, 8, 8, 8, 8, 8])
    for name in ("index_n_heads", "index_head_dim", "index_topk"):
        del fields[name]
    assert Config.from_dict(fields).index_topk == 0
    with pytest.raises(ConfigError, match="index_n_heads is missing"):
        Config.from_dict(fields | {"compress_ratios": [0, 0, 4, 8, 4, 8, 4]})


@pytest.mark.parametrize("text", ["", "{", "[]", "3", '{"vocab_size": 1', "\xff", "[" * 100_000])
def test_a_damaged_file_is_named(tmp_path, text: str) -> None:
    path = tmp_path / "config.json"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(ConfigError) as error:
        Config.from_file(path)
    assert str(error.value).startswith(f"{path}: ")
    assert "\n" not in str(error.value)


def test_a_missing_file_is_named(tmp_path) -> None:
    with pytest.raises(ConfigError, match=r"config\.json: cannot be read: No such file"):
        Config.from_file(tmp_path / "config.json")


def test_a_file_that_is_fine(tmp_path) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(flash_config()))
    assert Config.from_file(path) == Config.from_dict(flash_config())


def test_dspark_has_the_releases_values_unless_the_file_says_others() -> None:
    cfg = Config.from_dict(flash_config())
    assert cfg.dspark == Dspark(5, 256, 128_799, (40, 41, 42))
    said = {"dspark_block_size": 7, "dspark_target_layer_ids": [1, 2]}
    assert Config.from_dict(flash_config() | said).dspark == Dspark(7, 256, 128_799, (1, 2))
    with pytest.raises(ConfigError, match="dspark_target_layer_ids"):
        Config.from_dict(flash_config() | {"dspark_target_layer_ids": [43]})
