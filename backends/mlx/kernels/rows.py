"""Metal kernels that make rows as they are stored: twins of rows.row and of compress.entry.

Never run by their authors on a Mac; their text was run on a CPU (tests/metal_on_cpu.py).
"""

from typing import Any

import mlx.core as mx

from ..rows import FORMS, Form
from . import launch as metal
from .launch import Launch, Source

# A simdgroup a row. A lane holds channels 64 g + 2 lane and the next: the pair that turns together,
# of the 64 that share an FP8 scale. v[n] is channel 64 (n / 2) + 2 lane + n % 2.
_BEGIN = """
    uint r = threadgroup_position_in_grid.x;
    uint lane = thread_index_in_simdgroup;
    float v[C / 32];
"""
_LOAD = """
    for (uint n = 0; n < C / 32; n++) v[n] = x[r * C + 64 * (n / 2) + 2 * lane + n % 2];
"""
# Rows [K | gate] of a block, a softmax for each channel. With SIDES = 2 the first half of the rows
# are the block before, which shows the first C channels of K and of gate, and the own block the
# others.
_POOL = """
    for (uint n = 0; n < C / 32; n++) {
        uint channel = 64 * (n / 2) + 2 * lane + n % 2;
        float top = -INFINITY, total = 0, sum = 0;
        for (uint pass = 0; pass < 2; pass++) {
            for (uint j = 0; j < SIDES * RATIO; j++) {
                int at = rows[r * SIDES * RATIO + j];
                if (at < 0) continue;
                uint c = channel + j / RATIO * C;
                const device float* row = ring + ulong(at) * 2 * SIDES * C;
                float gate = row[SIDES * C + c] + ape[j % RATIO * SIDES * C + c];
                if (pass == 0) {
                    top = metal::max(top, gate);
                } else {
                    float share = metal::exp(gate - top);
                    total += share;
                    sum += share * row[c];
                }
            }
        }
        v[n] = sum / total;
    }
"""
_NORM = """
    float squares = 0;
    for (uint n = 0; n < C / 32; n++) squares += v[n] * v[n];
    float inverse = 1 / metal::sqrt(simd_sum(squares) / C + EPS);
    for (uint n = 0; n < C / 32; n++) v[n] *= inverse * norm[64 * (n / 2) + 2 * lane + n % 2];
"""
_TURN = """
    for (uint g = (C - R) / 64; g < C / 64; g++) {
        uint p = r / HEADS * R + 64 * g - (C - R) + 2 * lane;
        float a = v[2 * g], b = v[2 * g + 1];
        v[2 * g] = a * turn[p] - b * turn[p + 1];
        v[2 * g + 1] = a * turn[p + 1] + b * turn[p];
    }
"""
# FP8 with a power of two for 64 channels, and bf16 for the turned ones.
_ROUND_KV = """
    for (uint g = 0; g < C / 64; g++) {
        float most = simd_max(metal::max(metal::fabs(v[2 * g]), metal::fabs(v[2 * g + 1])));
        float ratio = metal::max(most, 1e-4f) / 448;
        float scale = as_type<float>((as_type<uint>(ratio) + 0x7FFFFF) & 0x7F800000);
        for (uint n = 2 * g; n < 2 * g + 2; n++) {
            uint bits = as_type<uint>(v[n]);
            if (64 * g >= C - R) {
                v[n] = as_type<float>((bits + 0x7FFF + (bits >> 16 & 1)) & 0xFFFF0000);
            } else {
                float q = v[n] / scale;
                int power = metal::max(int(as_type<uint>(q) >> 23 & 255) - 127, -6);
                float step = as_type<float>(uint(power - 3 + 127) << 23);
                v[n] = metal::rint(q / step) * step * scale;
            }
        }
    }
"""
# Hadamard: bits 0 and from 6 of a channel's number are in a lane, the others across lanes. Then FP4
# with a power of two for 32 channels, which lie in 16 lanes.
_ROUND_INDEX = """
    for (uint w = 1; w < C; w *= 2) {
        if (w == 1 || w >= 64) {
            uint step = w == 1 ? 1 : w / 32;
            for (uint n = 0; n < C / 32; n++) {
                if (n & step) continue;
                float a = v[n], b = v[n + step];
                v[n] = a + b;
                v[n + step] = a - b;
            }
        } else {
            for (uint n = 0; n < C / 32; n++) {
                float other = simd_shuffle_xor(v[n], w / 2);
                v[n] = lane & (w / 2) ? other - v[n] : v[n] + other;
            }
        }
    }
    float root = 1 / metal::sqrt(float(C));
    for (uint g = 0; g < C / 64; g++) {
        float a = v[2 * g] * root, b = v[2 * g + 1] * root;
        float most = metal::max(metal::fabs(a), metal::fabs(b));
        for (uint w = 1; w < 16; w *= 2) most = metal::max(most, simd_shuffle_xor(most, w));
        float ratio = metal::max(most, 6 * 1.17549435e-38f) / 6;
        float scale = as_type<float>((as_type<uint>(ratio) + 0x7FFFFF) & 0x7F800000);
        for (uint n = 2 * g; n < 2 * g + 2; n++) {
            float q = (n % 2 ? b : a) / scale, size = metal::fabs(q);
            float step = size < 2 ? 0.5f : size < 4 ? 1.0f : 2.0f;
            v[n] = metal::rint(q / step) * step * scale;
        }
    }
"""
_STORE = """
    for (uint n = 0; n < C / 32; n++) out[r * C + 64 * (n / 2) + 2 * lane + n % 2] = TYPE(v[n]);
"""
_ROUND: dict[Form, str] = {"as it is": "", "kv": _ROUND_KV, "index": _ROUND_INDEX}


_STORED: dict[Form, Any] = {"as it is": mx.float32, "kv": mx.bfloat16, "index": mx.bfloat16}


def _source(name: str, inputs: tuple[str, ...], form: Form, *begin: str) -> Source:
    stored = _STORED[form] == mx.bfloat16 and name != "query"
    store = _STORE.replace("TYPE", "bfloat16_t" if stored else "float")
    body = "".join([_BEGIN, *begin, _TURN, _ROUND[form], store])
    return Source(f"{name}_{FORMS.index(form)}", inputs, ("out",), body)


_ROW = {form: _source("row", ("x", "norm", "turn"), form, _LOAD, _NORM) for form in FORMS}
_QUERY = {form: _source("query", ("x", "turn"), form, _LOAD) for form in FORMS}
_ENTRY = {
    form: _source("entry", ("ring", "rows", "ape", "norm", "turn"), form, _POOL, _NORM)
    for form in FORMS
}


def serves(width: int, rotary: int) -> bool:
    return width % 64 == 0 and rotary % 64 == 0


def row(x: mx.array, norm: mx.array | None, turn: mx.array, eps: float, form: Form) -> mx.array:
    """(T, ..., C), weights (C,) or none and then no norm, complex turns (T, rotary / 2) -> x's.

    With a norm it is a row to be stored, and has the type of its form; without, a query, float32.
    """
    width = x.shape[-1]
    heads = x.size // (len(x) * width)
    constants = {"C": width, "R": 2 * turn.shape[1], "HEADS": heads, "EPS": float(eps)}
    dtype = mx.float32 if norm is None else _STORED[form]
    how = Launch((len(x) * heads, 1), 32, [x.shape], [dtype])
    turns = turn.view(mx.float32)
    if norm is None:
        return metal.launch(_QUERY[form], constants, [x, turns], how)[0]
    return metal.launch(_ROW[form], constants, [x, norm, turns], how)[0]


def entry(
    ring: mx.array,
    rows: mx.array,
    ape: mx.array,
    norm: mx.array,
    turn: mx.array,
    eps: float,
    form: Form,
) -> mx.array:
    """`rows` (E, n), numbers of rows of `ring`, -1 for none -> (E, C); see compress.entry."""
    count, width, ratio = len(rows), norm.size, len(ape)
    constants = {
        "C": width,
        "R": 2 * turn.shape[1],
        "HEADS": 1,
        "EPS": float(eps),
        "RATIO": ratio,
        "SIDES": rows.shape[1] // ratio,
    }
    how = Launch((count, 1), 32, [(count, width)], [_STORED[form]])
    arrays = [ring, rows, ape, norm, turn.view(mx.float32)]
    return metal.launch(_ENTRY[form], constants, arrays, how)[0]
