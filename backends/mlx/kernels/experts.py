"""Metal kernels of the router and of the experts' first half, for a few tokens at a time.

Twins: experts.route; swiglu over gather_qmm of FP4 experts; x @ W of a bf16 matrix, which MLX would
convert to float32 at each use. Never run by their authors on a Mac; their text was run on a CPU
(tests/metal_on_cpu.py).
"""

import mlx.core as mx

from ..weights import Beside, Matrix, Packed, Plain
from . import launch as metal
from .launch import Launch, Source

GROUPS = 8

# A simdgroup a token; a lane holds every 32nd expert. The best is taken K times, the lower id of
# equal ones. log(1 + e) is corrected for what 1 + e rounds away.
_ROUTE = Source(
    "route",
    ("logits", "bias"),
    ("ids", "weights"),
    """
    uint t = threadgroup_position_in_grid.x;
    uint lane = thread_index_in_simdgroup;
    float score[E / 32], biased[E / 32];
    for (uint n = 0; n < E / 32; n++) {
        float z = logits[t * E + 32 * n + lane];
        float e = metal::exp(-metal::fabs(z));
        float u = 1 + e;
        float low = u == 1 ? e : metal::log(u) * e / (u - 1);
        score[n] = metal::sqrt(metal::max(z, 0.0f) + low);
        biased[n] = score[n] + bias[32 * n + lane];
    }
    float sum = 0, mine = 0;
    for (int k = 0; k < K; k++) {
        float best = biased[0];
        for (uint n = 1; n < E / 32; n++) best = metal::max(best, biased[n]);
        best = simd_max(best);
        uint id = E;
        for (int n = E / 32 - 1; n >= 0; n--) if (biased[n] == best) id = 32 * n + lane;
        id = simd_min(id);
        float found = 0;
        for (uint n = 0; n < E / 32; n++) {
            if (32 * n + lane == id) {
                found = score[n];
                biased[n] = -INFINITY;
            }
        }
        found = simd_sum(found);
        sum += found;
        if (lane == uint(k)) {
            mine = found;
            ids[t * K + k] = id;
        }
    }
    if (lane < uint(K)) weights[t * K + lane] = mine / (sum + 1e-20f) * FACTOR;
    """,
)

# A simdgroup computes one gate and its up: rows `o` and `I + o` of the expert's joined matrix.
_GATE_UP = Source(
    "gate_up",
    ("x", "words", "scales", "ids"),
    ("out",),
    """
    uint pair = threadgroup_position_in_grid.y;
    uint o = threadgroup_position_in_grid.x * GROUPS + simdgroup_index_in_threadgroup;
    uint lane = thread_index_in_simdgroup;
    const device float* row = x + pair / K * D;
    ulong first = ulong(ids[pair]) * 2 * I + o;
    const device uint* gates = words + first * (D / 8);
    const device uint* ups = gates + ulong(I) * (D / 8);
    const device uchar* gate_scales = scales + first * (D / 32);
    const device uchar* up_scales = gate_scales + ulong(I) * (D / 32);
    float gate = 0, up = 0;
    for (uint w = lane; w < D / 8; w += 32) {
        uint a = gates[w], b = ups[w];
        float left = 0, right = 0;
        for (uint n = 0; n < 8; n++) {
            float value = row[8 * w + n];
            left += value * FP4_VALUES[a >> 4 * n & 15];
            right += value * FP4_VALUES[b >> 4 * n & 15];
        }
        gate += left * as_type<float>(uint(gate_scales[w / 4]) << 23);
        up += right * as_type<float>(uint(up_scales[w / 4]) << 23);
    }
    gate = metal::min(simd_sum(gate), LIMIT);
    up = metal::min(metal::max(simd_sum(up), -LIMIT), LIMIT);
    if (lane == 0) out[pair * I + o] = gate / (1 + metal::exp(-gate)) * up;
    """,
    header="constant float FP4_VALUES[16] = {0.0f, 0.5f, 1.0f, 1.5f, 2.0f, 3.0f, 4.0f, 6.0f, "
    "-0.0f, -0.5f, -1.0f, -1.5f, -2.0f, -3.0f, -4.0f, -6.0f};\n",
)

# A simdgroup a row of the matrix.
_MATVEC = Source(
    "matvec",
    ("x", "values"),
    ("out",),
    """
    uint o = threadgroup_position_in_grid.x * GROUPS + simdgroup_index_in_threadgroup;
    uint lane = thread_index_in_simdgroup;
    const device ushort* row = (const device ushort*)values + ulong(o) * D;
    float sum[T];
    for (uint t = 0; t < T; t++) sum[t] = 0;
    for (uint c = lane; c < D; c += 32) {
        float value = as_type<float>(uint(row[c]) << 16);
        for (uint t = 0; t < T; t++) sum[t] += value * x[t * D + c];
    }
    for (uint t = 0; t < T; t++) {
        float whole = simd_sum(sum[t]);
        if (lane == 0) out[t * O + o] = whole;
    }
    """,
)


def route(logits: mx.array, bias: mx.array, k: int, factor: float) -> tuple[mx.array, mx.array]:
    """(T, E), (E,) -> ids and weights (T, K); E is a multiple of 32, K at most 32."""
    tokens, count = logits.shape
    constants = {"E": count, "K": k, "FACTOR": float(factor)}
    how = Launch((tokens, 1), 32, [(tokens, k)] * 2, [mx.uint32, mx.float32])
    ids, weights = metal.launch(_ROUTE, constants, [logits, bias], how)
    return ids, weights


def routes(count: int, k: int) -> bool:
    return count % 32 == 0 and k <= 32


def gate_up(x: mx.array, stack: Packed, ids: mx.array, limit: float) -> mx.array:
    """(T, D), gates over ups of FP4 experts, (T, K) -> (T, K, I)."""
    tokens, width = x.shape
    inner, k = stack.rows_out // 2, ids.shape[1]
    constants = {"D": width, "I": inner, "K": k, "GROUPS": GROUPS, "LIMIT": float(limit)}
    groups = inner // GROUPS, tokens * k
    how = Launch(groups, 32 * GROUPS, [(tokens, k, inner)], [mx.float32])
    return metal.launch(_GATE_UP, constants, [x, stack.words, stack.scales, ids], how)[0]


def gates(stack: Matrix | Beside) -> bool:
    if not isinstance(stack, Packed) or stack.mode != "mxfp4":
        return False
    return stack.rows_out % (2 * GROUPS) == 0


def matvec(x: mx.array, matrix: Plain) -> mx.array:
    """(T, D), bf16 (O, D) -> (T, O), for a handful of tokens."""
    tokens, width = x.shape
    constants = {"T": tokens, "D": width, "O": matrix.rows_out, "GROUPS": GROUPS}
    groups = matrix.rows_out // GROUPS, 1
    how = Launch(groups, 32 * GROUPS, [(tokens, matrix.rows_out)], [mx.float32])
    return metal.launch(_MATVEC, constants, [x, matrix.values], how)[0]


def multiplies(matrix: Matrix) -> bool:
    if not isinstance(matrix, Plain) or matrix.values.dtype != mx.bfloat16:
        return False
    return matrix.values.ndim == 2 and matrix.rows_out % GROUPS == 0
