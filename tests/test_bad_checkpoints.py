"""Damaged, foreign and hostile checkpoints: each is one clear line that names file and tensor."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from tests.fixtures import (
    Tensors,
    official_tensors,
    random_official_state,
    small_config,
    write_folder,
)
from tests.loading import refusal

CFG = small_config(num_hidden_layers=4, compress_ratios=[0, 4, 8, 4], num_hash_layers=1)


@pytest.fixture(scope="module")
def good() -> Tensors:
    return official_tensors(random_official_state(CFG))


# tensors that do not fit

WQ_A, EXPERT = "layers.1.attn.wq_a.weight", "layers.2.ffn.experts.3.w2.weight"
WQ_A_SCALE, EXPERT_SCALE = WQ_A.replace("weight", "scale"), EXPERT.replace("weight", "scale")
TABLE = "layers.0.ffn.gate.tid2eid"


def drop(name: str) -> Callable[[Tensors], None]:
    return lambda tensors: tensors.pop(name) and None


def put(name: str, dtype: str, *shape: int) -> Callable[[Tensors], None]:
    size = {"F32": 4, "I64": 8, "BF16": 2, "F64": 8, "I16": 2}.get(dtype, 1)

    def change(tensors: Tensors) -> None:
        tensors[name] = (dtype, shape, bytes(size * int(np.prod(shape))))

    return change


def put_f16(name: str, size: int, at: int) -> Callable[[Tensors], None]:
    """An F16 vector with one infinite value."""
    values = np.ones(size, np.float16)
    values[at] = np.inf
    return lambda tensors: tensors.update({name: ("F16", (size,), values.tobytes())})


def poke(name: str, at: int, value: bytes) -> Callable[[Tensors], None]:
    """Overwrite bytes of a tensor."""

    def change(tensors: Tensors) -> None:
        dtype, shape, data = tensors[name]
        tensors[name] = (dtype, shape, data[:at] + value + data[at + len(value) :])

    return change


NAN, INF = np.float32(np.nan).tobytes(), np.float32(-np.inf).tobytes()
MISFITS: list[tuple[str, Callable[[Tensors], None], list[str]]] = [
    ("missing", drop(WQ_A), [WQ_A, "[128, 256] is missing", "download"]),
    ("missing expert", drop(EXPERT), [EXPERT, "[256, 128] is missing"]),
    ("missing table", drop(TABLE), [TABLE, "[512, 2] is missing"]),
    ("missing scale", drop(WQ_A_SCALE), [WQ_A, "F8_E4M3", "scale [1, 2] is missing"]),
    ("missing FP4 scale", drop(EXPERT_SCALE), [EXPERT, "scale [256, 4] is missing"]),
    ("shape", put(WQ_A, "F8_E4M3", 128, 128), [WQ_A, "[128, 128]", "F8_E4M3 [128, 256]"]),
    ("axes", put(WQ_A, "F8_E4M3", 128 * 256), [WQ_A, "[32768]", "[128, 256]"]),
    ("transposed", put("embed.weight", "BF16", 256, 512), ["embed.weight", "[512, 256]"]),
    ("FP4 shape", put(EXPERT, "I8", 256, 128), [EXPERT, "I8 [256, 128]", "I8 [256, 64]"]),
    ("scale shape", put(WQ_A_SCALE, "F8_E8M0", 2, 1), [WQ_A_SCALE, "[2, 1]", "[1, 2]"]),
    ("scale dtype", put(WQ_A_SCALE, "F32", 1, 2), [WQ_A_SCALE, "F32", "F8_E8M0 [1, 2]"]),
    ("dtype", put(WQ_A, "F64", 128, 256), [WQ_A, "F64", "F8_E4M3"]),
    ("FP8 norm", put("norm.weight", "F8_E4M3", 256), ["norm.weight", "BF16, F16 or F32"]),
    ("FP8 embedding", put("embed.weight", "F8_E4M3", 512, 256), ["embed.weight", "BF16"]),
    ("FP8 stream mix", put("layers.0.hc_attn_fn", "F8_E4M3", 24, 1024), ["hc_attn_fn", "F32"]),
    ("float table", put(TABLE, "F32", 512, 2), [TABLE, "F32", "I64 or I32"]),
    ("short table", put(TABLE, "I16", 512, 2), [TABLE, "I16", "I64 or I32"]),
    ("scaled BF16", put(WQ_A, "BF16", 128, 256), [WQ_A_SCALE, "BF16", "no scale"]),
    ("mixed experts", put("layers.2.ffn.experts.3.w2.weight", "BF16", 256, 128), ["no scale"]),
    ("layer too many", put("layers.4.attn_norm.weight", "F32", 256), ["layers.4", "no place"]),
    ("foreign pool", put("layers.0.attn.compressor.ape", "F32", 8, 128), ["layers.0", "no place"]),
    ("table and bias", put("layers.1.ffn.gate.tid2eid", "I64", 512, 2), ["layers.1", "no place"]),
    ("expert too many", put("layers.1.ffn.experts.8.w1.weight", "I8", 128, 128), ["experts.8"]),
    ("lone scale", put("layers.1.attn.q_norm.scale", "F8_E8M0", 1, 1), ["q_norm.scale"]),
    ("same twice", put("lm_head.weight", "BF16", 512, 256), ["head.weight", "lm_head.weight"]),
    ("scale 255", poke(WQ_A_SCALE, 1, b"\xff"), [WQ_A_SCALE, "[0, 1]", "scale byte 255"]),
    ("FP4 scale 255", poke(EXPERT_SCALE, 9, b"\xff"), [EXPERT_SCALE, "[2, 1]", "byte 255"]),
    ("NaN code", poke(WQ_A, 300, b"\x7f"), [WQ_A, "[1, 44]", "NaN"]),
    ("-NaN code", poke(WQ_A, 300, b"\xff"), [WQ_A, "[1, 44]", "NaN"]),
    ("NaN norm", poke("norm.weight", 6, b"\xc0\x7f"), ["norm.weight", "[3]", "NaN or infinite"]),
    ("inf sink", poke("layers.2.attn.attn_sink", 4, INF), ["attn_sink", "[1]", "infinite"]),
    ("NaN ape", poke("layers.2.attn.compressor.ape", 4 * 129, NAN), ["ape", "[1, 1]"]),
    ("NaN bias", poke("layers.3.ffn.gate.bias", 0, NAN), ["gate.bias", "[0]"]),
    ("F16", put_f16("norm.weight", 256, 200), ["norm.weight", "[200]", "infinite"]),
    ("NaN base", poke("hc_head_base", 12, NAN), ["hc_head_base", "[3]"]),
    ("large id", poke(TABLE, 24, np.int64(8).tobytes()), [TABLE, "[1, 1]", "outside 0..7"]),
    ("negative id", poke(TABLE, 0, np.int64(-1).tobytes()), [TABLE, "[0, 0]", "outside 0..7"]),
    ("vast id", poke(TABLE, 0, np.int64(2**62).tobytes()), [TABLE, "[0, 0]"]),
]


@pytest.mark.parametrize(("change", "words"), [m[1:] for m in MISFITS], ids=[m[0] for m in MISFITS])
def test_misfit(tmp_path: Path, good: Tensors, change: Callable, words: list[str]) -> None:
    tensors = dict(good)
    change(tensors)
    write_folder(tmp_path, CFG, tensors)
    message = refusal(tmp_path, CFG)
    for word in words:
        assert word in message


def test_experts_of_two_dtypes(tmp_path: Path, good: Tensors) -> None:
    tensors = dict(good)
    del tensors[EXPERT_SCALE]
    put(EXPERT, "BF16", 256, 128)(tensors)
    write_folder(tmp_path, CFG, tensors)
    assert f"{EXPERT}: is BF16, but layers.2.ffn.experts.0.w2.weight is I8" in refusal(
        tmp_path, CFG
    )
