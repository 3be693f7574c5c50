"""Hyper-connection kernels on a GPU: checked against float64, or timed in CUDA graphs.

python -m bench.gpu_hyper [check]
"""

import random

import torch
import triton
from ds4.backends.cuda.kernels import early
from ds4.backends.cuda.kernels import hyper as K
from ds4.backends.cuda.kernels import norm as N

from .machine import named_parts

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
    x = (
        torch.zeros(D // 8, n, 8, device=dev, dtype=torch.float16)
        if n
        else new(T, D, dtype=torch.float16)
    )
    return x, ((8 * n, 8) if n else (8, D))


def rows_of(x):
    return x if x.ndim == 2 else x.transpose(0, 1).reshape(x.shape[1], -1)


def worst(got, want):
    return ((got.double() - want).abs().max() / want.abs().max()).item()


def check_hyper():
    for T in (1, 7, 8, 9, 33, 2500):
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
        errors += [
            worst(out, e),
            worst(sums.double().sum(1)[:, :24], e.flatten(1) @ w[0].double().T),
        ]
        print(
            f"T {T:5d} streams {errors[0]:.1e} proj {proj:.1e} x {errors[1]:.1e}"
            f" post {errors[2]:.1e} comb {errors[3]:.1e} head {errors[4]:.1e}"
            f" embed {errors[5]:.1e} {errors[6]:.1e}"
        )
        limits = 1e-6, 6e-4, 1e-5, 1e-5, 6e-4, 1e-30, 1e-5
        assert all(e < limit for e, limit in zip(errors, limits, strict=True)), errors
        assert proj < 1e-5, proj


def time_hyper(T):
    ws = [weights() for _ in range(40 if T <= 512 else 4)]
    norm, eps = torch.rand(D, device=dev), {"eps": EPS, "hc_eps": EPS}
    h, y, _, mix = state(T)
    out, sums = K.post_mix(h, y, mix, ws[0][0])
    x, strides = panel(T)
    first = [lambda w=w: K.post_mix(h, y, mix, w[0], out=out, partial=sums) for w in ws]
    second = [
        lambda w=w: K.finish(out, sums, *w[1:], norm, x, strides, **eps, rounds=20, mix=mix)
        for w in ws
    ]
    only = [lambda w=w: K.sublayer_input(out, sums, *w[1:], norm, x, strides, **eps) for w in ws]
    both = graph_us([f for pair in zip(first, second, strict=True) for f in pair]) * 2
    megabytes = (24 * 16 * D + T * D * (36 + 18)) / 1e6
    print(
        f"T {T:5d} post_mix {graph_us(first):7.2f} us, finish {graph_us(second):7.2f} (x only"
        f" {graph_us(only):7.2f}), both {both:7.2f}; {megabytes:8.2f} MB, floor"
        f" {megabytes / 3:7.2f} us; 86 of them {both * 86 / 1e3:6.2f} ms"
    )


def ways(T):
    """A cycle of both kernels and four others: plain, the mix beside them, launched early."""
    ws, norm = [weights() for _ in range(40)], torch.rand(D, device=dev)
    h, y, _, mix = state(T)
    out, sums = K.post_mix(h, y, mix, ws[0][0])
    x, strides = panel(T)
    g, q, z = new(1024), torch.zeros(8192 * T, device=dev, dtype=torch.float16), new(T, 1024)
    side, eps = torch.cuda.Stream(), {"eps": EPS, "hc_eps": EPS}

    def cycle(w, fork):
        K.post_mix(out, y, mix, w[0], out=out, partial=sums)
        now = torch.cuda.current_stream()
        if fork:
            side.wait_stream(now)
            with torch.cuda.stream(side):
                K.next_mix(sums, w[1], w[2], D, **eps, rounds=20, mix=mix)
            K.sublayer_input(out, sums, w[1], w[2], norm, x, strides, **eps)
        else:
            K.finish(out, sums, w[1], w[2], norm, x, strides, **eps, rounds=20, mix=mix)
        for _ in range(4):
            N.rms_norm(z, g, q, (8 * T, 8), EPS)
        if fork:
            now.wait_stream(side)

    def result():
        """What a graph of all cycles leaves, from the same start."""
        cycle(ws[0], fork)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for w in ws:
                cycle(w, fork)
        out.copy_(h), mix[0].copy_(start[0]), mix[1].copy_(start[1])
        graph.replay()
        torch.cuda.synchronize()
        return out.clone(), x.clone()

    start, want, line = (mix[0].clone(), mix[1].clone()), None, ""
    for early.EARLY in (0, 32):
        for fork in (False, True):
            found = result()
            want = want or found
            assert all(map(torch.equal, want, found)), (early.EARLY, fork)
            us = graph_us([lambda w=w: cycle(w, fork) for w in ws])  # noqa: B023
            line += (
                f"{' early' if early.EARLY else ''}{' mix beside' if fork else ' plain'} {us:.2f}"
            )
    early.EARLY = 0
    print(f"T {T:5d} cycle with 4 norms, us:{line}")


if __name__ == "__main__":
    given = named_parts(__doc__, "check")
    torch.manual_seed(random.randrange(1 << 30))
    print(torch.cuda.get_device_name(), torch.__version__, triton.__version__)
    if given:
        check_hyper()
    else:
        for T in (1, 8, 32, 64, 512, 8192):
            time_hyper(T)
        for T in (1, 2):
            ways(T)
