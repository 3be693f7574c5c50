"""Metal kernel for sparse attention with a sink, a few tokens at a time: twin of attention.attend.

Never run by its authors on a Mac; its text was run on a CPU (tests/metal_on_cpu.py).
"""

import mlx.core as mx

from . import launch as metal
from .launch import Launch, Source

GROUPS = 8

# A threadgroup a token and head. Each of its simdgroups norms and turns the query, goes through
# every eighth row with a running softmax, and leaves its part; together they add up the parts and
# the sink, and turn the result back. Lanes hold channels as in rows.py.
_ATTEND = Source(
    "attend",
    ("q", "sink", "turn", "ring", "near", "pool", "far"),
    ("out",),
    """
    uint t = threadgroup_position_in_grid.y, head = threadgroup_position_in_grid.x;
    uint i = thread_position_in_threadgroup.x;
    uint lane = thread_index_in_simdgroup;
    uint group = simdgroup_index_in_threadgroup;
    threadgroup float part[GROUPS * C];
    threadgroup float tops[GROUPS];
    threadgroup float totals[GROUPS];

    const device float* query = q + (t * N + head) * C;
    float v[C / 32];
    float sum = 0;
    for (uint n = 0; n < C / 32; n++) {
        v[n] = query[64 * (n / 2) + 2 * lane + n % 2];
        sum += v[n] * v[n];
    }
    float factor = SCALE / metal::sqrt(simd_sum(sum) / C + EPS);
    for (uint g = 0; g < C / 64; g++) {
        float a = v[2 * g] * factor, b = v[2 * g + 1] * factor;
        if (64 * g >= C - R) {
            uint p = t * R + 64 * g - (C - R) + 2 * lane;
            float left = a * turn[p] - b * turn[p + 1];
            b = a * turn[p + 1] + b * turn[p];
            a = left;
        }
        v[2 * g] = a;
        v[2 * g + 1] = b;
    }

    int window = near_shape[1], entries = far_shape[1];
    float top = -1e30f, total = 0;
    float acc[C / 32];
    for (uint n = 0; n < C / 32; n++) acc[n] = 0;
    for (int j = group; j < window + entries; j += GROUPS) {
        int at = j < window ? near[t * window + j] : far[t * entries + j - window];
        if (at < 0) continue;
        auto key = (j < window ? ring : pool) + ulong(at) * C;
        float k[C / 32];
        float dot = 0;
        for (uint n = 0; n < C / 32; n++) {
            k[n] = float(key[64 * (n / 2) + 2 * lane + n % 2]);
            dot += v[n] * k[n];
        }
        dot = simd_sum(dot);
        float higher = metal::max(top, dot);
        float keep = metal::exp(top - higher), share = metal::exp(dot - higher);
        top = higher;
        total = total * keep + share;
        for (uint n = 0; n < C / 32; n++) acc[n] = acc[n] * keep + share * k[n];
    }
    for (uint n = 0; n < C / 32; n++) {
        part[group * C + 64 * (n / 2) + 2 * lane + n % 2] = acc[n];
    }
    if (lane == 0) {
        tops[group] = top;
        totals[group] = total;
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);

    top = sink[head];
    for (uint g = 0; g < GROUPS; g++) top = metal::max(top, tops[g]);
    total = metal::exp(sink[head] - top);
    for (uint g = 0; g < GROUPS; g++) total += totals[g] * metal::exp(tops[g] - top);
    for (uint c = 2 * i; c < C; c += 2 * 32 * GROUPS) {
        float a = 0, b = 0;
        for (uint g = 0; g < GROUPS; g++) {
            float share = metal::exp(tops[g] - top) / total;
            a += part[g * C + c] * share;
            b += part[g * C + c + 1] * share;
        }
        if (c >= C - R) {
            uint p = t * R + c - (C - R);
            float left = a * turn[p] + b * turn[p + 1];
            b = b * turn[p] - a * turn[p + 1];
            a = left;
        }
        out[(t * N + head) * C + c] = a;
        out[(t * N + head) * C + c + 1] = b;
    }
    """,
)


def serves(width: int, rotary: int) -> bool:
    """Widths that fit the lanes, and threadgroup memory of 32 KiB."""
    return width % 64 == 0 and rotary % 64 == 0 and width <= 512


def attend(
    q: mx.array,
    sink: mx.array,
    turn: mx.array,
    ring: mx.array,
    near: mx.array,
    pool: mx.array,
    far: mx.array,
    eps: float,
) -> mx.array:
    """(T, N, C), as projected -> (T, N, C), turned back.

    `near` (T, W) and `far` (T, K) are row numbers, -1 for none, in `ring` and `pool`, which are
    (rows, C), both float32 or both bf16; `turn` is complex (T, rotary / 2).
    """
    tokens, heads, width = q.shape
    constants = {
        "N": heads,
        "C": width,
        "R": 2 * turn.shape[1],
        "GROUPS": GROUPS,
        "SCALE": float(width**-0.5),
        "EPS": float(eps),
    }
    how = Launch((heads, tokens), 32 * GROUPS, [q.shape], [mx.float32])
    arrays = [q, sink, turn.view(mx.float32), ring, near, pool, far]
    return metal.launch(_ATTEND, constants, arrays, how)[0]
