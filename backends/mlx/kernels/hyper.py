"""Metal kernels of the hyper-connections: twins of hyper.mix and hyper.spread.

Never run by its authors on a Mac; its text was run on a CPU (tests/metal_on_cpu.py).
"""

from typing import Any

import mlx.core as mx

from ds4.config import Config

from . import launch as metal
from .launch import Launch, Source

THREADS = 256

# A threadgroup a token. The Sinkhorn matrix lies in 16 lanes, lane 4 i + j holding (i, j): sums
# over i meet across lanes 4 and 8 apart, sums over j across 1 and 2.
_MIX = Source(
    "hc_mix",
    ("raw", "h", "scale", "base", "norm"),
    ("x", "post", "comb"),
    """
    uint t = threadgroup_position_in_grid.x;
    uint i = thread_position_in_threadgroup.x;
    uint lane = thread_index_in_simdgroup;
    uint group = simdgroup_index_in_threadgroup;
    threadgroup float partial[THREADS / 32];
    threadgroup float pre[4];
    const device float* row = h + t * 4 * D;
    const device float* m = raw + t * 24;

    float sum = 0;
    for (uint c = i; c < 4 * D; c += THREADS) sum += row[c] * row[c];
    sum = simd_sum(sum);
    if (lane == 0) partial[group] = sum;
    threadgroup_barrier(mem_flags::mem_threadgroup);
    sum = 0;
    for (uint g = 0; g < THREADS / 32; g++) sum += partial[g];
    float inverse = 1 / metal::sqrt(sum / (4 * D) + EPS);

    if (group == 0) {
        if (i < 8) {
            float z = m[i] * inverse * scale[i / 4] + base[i];
            float gate = 1 / (1 + metal::exp(-z));
            if (i < 4) pre[i] = gate + HC_EPS;
            else post[t * 4 + i - 4] = 2 * gate;
        }
        uint k = lane % 16;
        float z = m[8 + k] * inverse * scale[2] + base[8 + k];
        float top = metal::max(z, simd_shuffle_xor(z, 1));
        top = metal::max(top, simd_shuffle_xor(top, 2));
        float a = metal::exp(z - top);
        float s = a + simd_shuffle_xor(a, 1);
        s += simd_shuffle_xor(s, 2);
        a = a / s + HC_EPS;
        for (int n = 0; n < 2 * ROUNDS - 1; n++) {
            int step = n % 2 ? 1 : 4;
            s = a + simd_shuffle_xor(a, step);
            s += simd_shuffle_xor(s, 2 * step);
            a = a / (s + HC_EPS);
        }
        if (lane < 16) comb[t * 16 + lane] = a;
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);

    float mine[D / THREADS];
    sum = 0;
    for (uint n = 0; n < D / THREADS; n++) {
        uint c = n * THREADS + i;
        mine[n] = pre[0] * row[c] + pre[1] * row[D + c]
                + pre[2] * row[2 * D + c] + pre[3] * row[3 * D + c];
        sum += mine[n] * mine[n];
    }
    sum = simd_sum(sum);
    if (lane == 0) partial[group] = sum;
    threadgroup_barrier(mem_flags::mem_threadgroup);
    sum = 0;
    for (uint g = 0; g < THREADS / 32; g++) sum += partial[g];
    inverse = 1 / metal::sqrt(sum / D + EPS);
    for (uint n = 0; n < D / THREADS; n++) {
        uint c = n * THREADS + i;
        x[t * D + c] = mine[n] * inverse * norm[c];
    }
    """,
)

_SPREAD = Source(
    "hc_spread",
    ("x", "h", "post", "comb"),
    ("out",),
    """
    uint t = threadgroup_position_in_grid.y;
    uint c = threadgroup_position_in_grid.x * THREADS + thread_position_in_threadgroup.x;
    const device float* row = h + t * 4 * D;
    for (uint o = 0; o < 4; o++) {
        float sum = post[t * 4 + o] * x[t * D + c];
        for (uint i = 0; i < 4; i++) sum += comb[t * 16 + 4 * i + o] * row[i * D + c];
        out[(t * 4 + o) * D + c] = sum;
    }
    """,
)


def serves(cfg: Config) -> bool:
    return cfg.hc_mult == 4 and cfg.hidden_size % THREADS == 0


def mix(w: Any, norm: mx.array, h: mx.array, raw: mx.array, cfg: Config) -> list[mx.array]:
    tokens, _, width = h.shape
    constants = {
        "D": width,
        "THREADS": THREADS,
        "ROUNDS": cfg.hc_sinkhorn_iters,
        "EPS": float(cfg.rms_norm_eps),
        "HC_EPS": float(cfg.hc_eps),
    }
    shapes = [(tokens, width), (tokens, 4), (tokens, 4, 4)]
    how = Launch((tokens, 1), THREADS, shapes, [mx.float32] * 3)
    return metal.launch(_MIX, constants, [raw, h, w.scale, w.base, norm], how)


def spread(x: mx.array, h: mx.array, post: mx.array, comb: mx.array) -> mx.array:
    tokens, _, width = h.shape
    how = Launch((width // THREADS, tokens), THREADS, [h.shape], [mx.float32])
    constants = {"D": width, "THREADS": THREADS}
    return metal.launch(_SPREAD, constants, [x, h, post, comb], how)[0]
