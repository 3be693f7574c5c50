"""Small kernels between the matrices on a GPU: checked against float64, then timed in CUDA graphs."""

import sys

import torch
import triton
from ds4.backends.cuda.kernels import hyper as K

D, EPS, dev = 4096, 1e-6, "cuda"


def new(*shape, scale=1.0, dtype=torch.float32):
    return (torch.randn(*shape, device=dev) * scale).to(dtype)


def graph_us(fns, repeats=20):
    """Median microseconds a call, fns called in turn inside one graph."""
    for f in fns[:2]:
        f()
    torch.cuda.synchronize()
    g = torch.cuda.CUDAGraph()
    with torch.cuda.graph(g):
        for f in fns:
            f()
    times = []
    for _ in range(repeats):
        a, b = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        a.record()
        g.replay()
        b.record()
        b.synchronize()
        times.append(a.elapsed_time(b) * 1e3 / len(fns))
    return sorted(times)[len(times) // 2]


def reference(h, y, mix, w, norm, rounds=20):
    h, y, post, comb = h.double(), y.double(), mix[0].double(), mix[1].double().view(-1, 4, 4)
    n = post[:, :, None] * y[:, None] + comb.transpose(1, 2) @ h
    x, m = pre(n, w, norm, rounds)
    return n, x, m


def pre(n, w, norm, rounds):
    fn, scale, base = (t.double() for t in w)
    f = n.flatten(1)
    m = (f * (f.square().mean(1, keepdim=True) + EPS).rsqrt()) @ fn.T
    p = (m[:, :4] * scale[0] + base[:4]).sigmoid() + EPS
    x = (p[:, :, None] * n).sum(1)
    x = x * (x.square().mean(1, keepdim=True) + EPS).rsqrt() * norm.double()
    if not rounds:
        return x, None
    post = 2 * (m[:, 4:8] * scale[1] + base[4:8]).sigmoid()
    c = (m[:, 8:] * scale[2] + base[8:]).view(-1, 4, 4).softmax(-1) + EPS
    c = c / (c.sum(1, keepdim=True) + EPS)
    for _ in range(rounds - 1):
        c = c / (c.sum(2, keepdim=True) + EPS)
        c = c / (c.sum(1, keepdim=True) + EPS)
    return x, (post, c.flatten(1))


def weights(rows=24):
    return new(rows, 4 * D, scale=0.02), torch.rand(3 if rows == 24 else 1, device=dev), new(rows)


def state(T):
    mix = torch.rand(T, 4, device=dev) * 2, torch.rand(T, 16, device=dev) / 2
    return new(T, 4, D, scale=3), new(T, 2 * D)[:, :D], new(T, D), mix


def panel(T):
    n = T if T <= 32 else 0
    x = torch.zeros(D // 8, n, 8, device=dev, dtype=torch.float16) if n else new(T, D, dtype=torch.float16)
    return x, ((8 * n, 8) if n else (8, D))


def rows_of(x):
    return x if x.ndim == 2 else x.transpose(0, 1).reshape(x.shape[1], -1)


def worst(got, want):
    return ((got.double() - want).abs().max() / want.abs().max()).item()


def check_hyper():
    for T in (1, 2, 3, 4, 5, 8, 13, 32, 33, 100, 511, 1024):
        w, norm = weights(), torch.rand(D, device=dev) + 0.5
        h, y, y2, mix = state(T)
        n, x, m = reference(h, y + y2, mix, w, norm)
        out, sums = K.post_mix(h, y, mix, w[0], y2=y2)
        got, strides = panel(T)
        gm = K.finish(out, sums, w[1], w[2], norm, got, strides, eps=EPS, hc_eps=EPS, rounds=20)
        errors = [worst(out, n), worst(rows_of(got), x), worst(gm[0], m[0]), worst(gm[1], m[1])]
        # projections alone
        f = n.flatten(1)
        proj = worst(sums.double().sum(1)[:, :24], f @ w[0].double().T)
        rows = torch.randint(0, T, (max(1, T // 2),), device=dev, dtype=torch.int32)
        hw = weights(4)
        hx, _ = pre(n[rows.long()], hw, norm, 0)
        got, strides = panel(len(rows))
        K.head(h, y, mix, *hw, norm, rows, got, strides, eps=EPS, hc_eps=EPS, y2=y2)
        errors.append(worst(rows_of(got), hx))
        table = new(1000, D, dtype=torch.bfloat16)
        tokens = torch.randint(0, 1000, (T,), device=dev, dtype=torch.int32)
        out, sums = K.embed_mix(table, tokens, w[0])
        e = table[tokens.long()].double()[:, None].repeat(1, 4, 1)
        errors += [worst(out, e), worst(sums.double().sum(1)[:, :24], e.flatten(1) @ w[0].double().T)]
        print(f"T {T:5d} streams {errors[0]:.1e} proj {proj:.1e} x {errors[1]:.1e} post {errors[2]:.1e}"
              f" comb {errors[3]:.1e} head {errors[4]:.1e} embed {errors[5]:.1e} {errors[6]:.1e}")
        assert errors[0] < 1e-6 and proj < 1e-5 and errors[1] < 6e-4 and max(errors[2:4]) < 1e-5, errors
        assert errors[4] < 6e-4 and errors[5] == 0 and errors[6] < 1e-5, errors


def time_hyper(T):
    copies = 40 if T <= 32 else 4
    ws, norm = [weights() for _ in range(copies)], torch.rand(D, device=dev)
    h, y, _, mix = state(T)
    out, sums = K.post_mix(h, y, mix, ws[0][0])
    x, strides = panel(T)
    def a(w):
        return lambda: K.post_mix(h, y, mix, w[0], out=out, partial=sums)
    def b(w, rounds=20):
        return lambda: K.finish(out, sums, w[1], w[2], norm, x, strides, eps=EPS, hc_eps=EPS, rounds=rounds, mix=mix if rounds else None)
    ta, tb = graph_us([a(w) for w in ws]), graph_us([b(w) for w in ws])
    tn = graph_us([b(w, 0) for w in ws])
    both = graph_us([f for w in ws for f in (a(w), b(w))]) * 2
    read_a = 24 * 4 * D * 4 + T * D * 4 * 9
    read_b = T * D * (16 + 2)
    floor = (read_a + read_b) / 3.0e6
    print(f"T {T:5d} post_mix {ta:8.2f} us, finish {tb:8.2f} (no sinkhorn {tn:8.2f}), both {both:8.2f}; {(read_a + read_b) / 1e6:.2f} MB floor {floor:.2f} us; x86 {both * 86 / 1e3:.2f} ms")


def variants_one(T):
    """Blocks of channels for the smallest batches, and both kernels where either could serve."""
    ws = [weights() for _ in range(40)]
    h, y, _, mix = state(T)
    for bd, warps in ((32, 4), (32, 8), (64, 4), (64, 8), (16, 4), (32, 2)):
        out, sums = h.clone(), torch.empty(T, D // bd, 64, device=dev)
        def run(w):
            return lambda: K._mix_one[D // bd, T](h, y, y, *mix, w[0], h, out, sums, y.stride(0), 0, D, FN=24, BD=bd, EMBED=False, GATHER=False, SECOND=False, num_warps=warps)
        print(f"  one T {T} BD {bd} warps {warps}: {graph_us([run(w) for w in ws]):.2f} us")
    for bt, bd, warps in ((16, 32, 4), (16, 32, 8), (16, 32, 2), (16, 16, 4)):
        out, sums = h.clone(), torch.empty(T, D // bd, 64, device=dev)
        def run(w):
            return lambda: K._mix_many[D // bd, triton.cdiv(T, bt)](h, y, y, *mix, w[0], h, out, sums, y.stride(0), 0, D, T, FN=24, BT=bt, BD=bd, STEPS=1, PRODUCE=True, EMBED=False, GATHER=False, SECOND=False, num_warps=warps)
        print(f"  many T {T} BT {bt} BD {bd} warps {warps}: {graph_us([run(w) for w in ws]):.2f} us")


def variants_finish(T):
    h, y, _, mix = state(T)
    ws, norm = [weights() for _ in range(40)], torch.rand(D, device=dev)
    x, strides = panel(T)
    for S in (64, 128):
        sums = torch.rand(T, S, 64, device=dev)
        for bd, warps in ((512, 4), (256, 4), (1024, 4), (512, 8), (1024, 8), (256, 2)):
            def run(w):
                return lambda: K._finish[(T * (D // bd) + T,)](h, sums, w[1], w[2], norm, x, *mix, T, D, strides[0] // 8, strides[1] // 8, EPS, EPS, S=S, ROUNDS=20, SLICES=D // bd, BD=bd, BS=S, BT=1, MS=S, PRODUCE=True, num_warps=warps)
            print(f"  finish T {T} S {S} BD {bd} warps {warps}: {graph_us([run(w) for w in ws]):.2f} us")


def variants_many(T):
    w = weights()
    h, y, _, mix = state(T)
    out = h.clone()
    for bt, bd, steps, warps, stages in ((64, 16, 32, 4, 2), (64, 16, 32, 4, 3), (64, 16, 32, 4, 1), (64, 16, 64, 4, 2), (64, 16, 16, 4, 2), (64, 32, 16, 8, 1), (64, 16, 32, 8, 2), (64, 32, 16, 8, 2), (128, 16, 32, 8, 2), (32, 16, 32, 2, 2), (32, 16, 32, 2, 3)):
        S = D // (bd * steps)
        sums = torch.empty(T, S, 64, device=dev)
        def run():
            K._mix_many[S, triton.cdiv(T, bt)](h, y, y, *mix, w[0], h, out, sums, y.stride(0), 0, D, T, FN=24, BT=bt, BD=bd, STEPS=steps, PRODUCE=False, EMBED=False, GATHER=False, SECOND=False, num_warps=warps, num_stages=stages)
        us = graph_us([run] * 4)
        print(f"  T {T} BT {bt} BD {bd} steps {steps} warps {warps} stages {stages}: {us:.1f} us, {T * D * 36 / us / 1e3:.0f} GB/s")


if __name__ == "__main__":
    torch.manual_seed(int(sys.argv[2]) if len(sys.argv) > 2 else 0)
    print(torch.cuda.get_device_name(), torch.__version__, triton.__version__)
    check_hyper()
    for T in (1, 2, 4, 5, 8, 16, 32, 512, 8192):
        time_hyper(T)
    if len(sys.argv) > 1 and sys.argv[1] == "variants":
        for T in (1, 4, 8, 32):
            variants_one(T)
        variants_finish(1)
        variants_finish(32)
        variants_many(8192)
