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
    for T in (1, 2, 3, 5, 8, 9, 13, 32, 33, 100, 511, 2500, 8192):
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
    copies = 40 if T <= 512 else 4
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


def overlapped():
    """Both kernels in turn: each launched when the last is done, or while it drains."""
    ws, norm = [weights() for _ in range(40)], torch.rand(D, device=dev)
    for T in (1, 8, 32):
        h, y, _, mix = state(T)
        out, sums = K.post_mix(h, y, mix, ws[0][0])
        x, strides = panel(T)
        for early in (False, True):
            K.EARLY = early
            a = lambda w: K.post_mix(out, y, mix, w[0], out=out, partial=sums)
            b = lambda w, rounds: K.finish(out, sums, w[1], w[2], norm, x, strides, eps=EPS, hc_eps=EPS, rounds=rounds, mix=mix if rounds else None)
            both = graph_us([lambda w=w: (a(w), b(w, 20)) for w in ws])
            less = graph_us([lambda w=w: (a(w), b(w, 0)) for w in ws])
            print(f"T {T} early {early}: both {both:.2f} us, without sinkhorn {less:.2f}")
    K.EARLY = False


def forked():
    """The mix in the same launch as x, or in a branch of the graph of its own."""
    from ds4.backends.cuda.kernels import norm as N

    ws, norm = [weights() for _ in range(40)], torch.rand(D, device=dev)
    side = torch.cuda.Stream()
    for T in (1, 8):
        h, y, _, mix = state(T)
        out, sums = K.post_mix(h, y, mix, ws[0][0])
        x, strides = panel(T)
        S, g = sums.shape[1], new(1024)
        q, z = torch.zeros(128 * 8 * T, device=dev, dtype=torch.float16), new(T, 1024)
        def cycle(w, fork):
            K.post_mix(out, y, mix, w[0], out=out, partial=sums)
            cur = torch.cuda.current_stream()
            if fork:
                side.wait_stream(cur)
                with torch.cuda.stream(side):
                    K._finish[(T,)](out, sums, w[1], w[2], norm, x, *mix, T, D, strides[0] // 8, strides[1] // 8, EPS, EPS, S=S, ROUNDS=20, SLICES=8, BD=512, BS=S, BT=1, MS=S, PRODUCE=True, EARLY=False, num_warps=4)
            K.finish(out, sums, w[1], w[2], norm, x, strides, eps=EPS, hc_eps=EPS, rounds=0 if fork else 20, mix=None if fork else mix)
            for _ in range(4):
                N.rms_norm(z, g, q, (8 * T, 8), 1e-6)
            if fork:
                cur.wait_stream(side)
        for fork in (False, True):
            us = graph_us([lambda w=w: cycle(w, fork) for w in ws])
            print(f"T {T} cycle with 4 norms, mix in its own branch {fork}: {us:.2f} us")


if __name__ == "__main__":
    torch.manual_seed(int(sys.argv[1]) if len(sys.argv) > 1 else 0)
    print(torch.cuda.get_device_name(), torch.__version__, triton.__version__)
    check_hyper()
    for T in (1, 2, 4, 8, 9, 16, 32, 64, 128, 512, 2048, 8192):
        time_hyper(T)
    overlapped()
    forked()
