"""Metal kernel that norms, turns and rounds rows before they are stored: twin of norm.store_form.

Never run by its authors on a Mac; its text was run on a CPU (tests/metal_on_cpu.py).
"""

import mlx.core as mx

from . import launch as metal
from .launch import Launch, Source

# A simdgroup a row. A lane holds channels 64 g + 2 lane and the next: the pair that turns together,
# of the 64 that share a scale.
_ROW = Source(
    "row",
    ("x", "norm", "turn"),
    ("out",),
    """
    uint r = threadgroup_position_in_grid.x;
    uint lane = thread_index_in_simdgroup;
    float v[C / 32];
    float sum = 0;
    for (uint n = 0; n < C / 32; n++) {
        v[n] = x[r * C + 64 * (n / 2) + 2 * lane + n % 2];
        sum += v[n] * v[n];
    }
    float inverse = 1 / metal::sqrt(simd_sum(sum) / C + EPS);
    for (uint n = 0; n < C / 32; n++) v[n] *= inverse * norm[64 * (n / 2) + 2 * lane + n % 2];

    for (uint g = 0; g < C / 64; g++) {
        float a = v[2 * g], b = v[2 * g + 1];
        if (64 * g >= C - R) {
            uint p = r * R + 64 * g - (C - R) + 2 * lane;
            float left = a * turn[p] - b * turn[p + 1];
            b = a * turn[p + 1] + b * turn[p];
            a = left;
            if (ROUNDED) {
                uint u = as_type<uint>(a), w = as_type<uint>(b);
                a = as_type<float>((u + 0x7FFF + (u >> 16 & 1)) & 0xFFFF0000);
                b = as_type<float>((w + 0x7FFF + (w >> 16 & 1)) & 0xFFFF0000);
            }
        } else if (ROUNDED) {
            float most = simd_max(metal::max(metal::fabs(a), metal::fabs(b)));
            float ratio = metal::max(most, 1e-4f) / 448;
            float scale = as_type<float>((as_type<uint>(ratio) + 0x7FFFFF) & 0x7F800000);
            for (uint e = 0; e < 2; e++) {
                float q = (e ? b : a) / scale;
                int power = metal::max(int(as_type<uint>(q) >> 23 & 255) - 127, -6);
                float step = as_type<float>(uint(power - 3 + 127) << 23);
                q = metal::rint(q / step) * step * scale;
                if (e) b = q; else a = q;
            }
        }
        out[r * C + 64 * g + 2 * lane] = a;
        out[r * C + 64 * g + 2 * lane + 1] = b;
    }
    """,
)


def serves(width: int, rotary: int) -> bool:
    return width % 64 == 0 and rotary % 64 == 0


def row(x: mx.array, norm: mx.array, turn: mx.array, eps: float, rounded: bool) -> mx.array:
    """(T, C), weights (C,), complex turns (T, rotary / 2) -> (T, C), FP8 and bf16 if `rounded`."""
    tokens, width = x.shape
    constants = {"C": width, "R": 2 * turn.shape[1], "EPS": float(eps), "ROUNDED": rounded}
    how = Launch((tokens, 1), 32, [x.shape], [mx.float32])
    return metal.launch(_ROW, constants, [x, norm, turn.view(mx.float32)], how)[0]
