"""Router, norm and greedy choice on a GPU: checked, then timed in CUDA graphs."""

import sys

import torch
from ds4.backends.cuda.kernels import norm as N
from ds4.backends.cuda.kernels import router as R
from ds4.backends.cuda.kernels import sample as S

from bench.gpu_hyper import graph_us, new, panel, rows_of, worst

E, KP, dev = 256, 6, "cuda"


def check_choice(gate, z, tokens, ids, weights):
    s = torch.nn.functional.softplus(z.double()).sqrt()
    if gate.table is not None:
        assert torch.equal(ids.long(), gate.table[tokens.long()])
    else:
        biased = s + gate.bias.double()
        want = biased.topk(KP).values
        assert (biased.gather(1, ids.long()) - want).abs().max() < 1e-5
        assert (ids.long().sort(1).values.diff(dim=1) > 0).all()
    want = s.gather(1, ids.long())
    want = want / want.sum(1, keepdim=True) * 1.5
    assert (weights.double() - want).abs().max() < 3e-6, (weights.double() - want).abs().max()


def inputs(T, hash):
    z = new(T, 2 * E, scale=2)[:, :E]
    table = torch.randint(0, E, (1000, KP), device=dev) if hash else None
    gate = R.Gate(None if hash else new(E, scale=0.1), table, E, KP, 1.5)
    tokens = torch.randint(0, 1000, (T,), device=dev, dtype=torch.int32)
    pos = torch.arange(T, device=dev, dtype=torch.int32)
    pos[T // 2 + 1 : T // 2 + 3] = -1
    return gate, z, tokens, pos


def check_router():
    for T in (1, 2, 3, 5, 8, 13, 31, 32, 33, 100, 511, 2048, 8192, 16384):
        for hash in (False, True):
            gate, z, tokens, pos = inputs(T, hash)
            hits = torch.zeros(E, dtype=torch.int64, device=dev)
            f = R.route_small if T <= 32 else lambda *a, **k: R.route_many(*a, 64, **k)
            ids, weights, p = f(gate, z, tokens, pos=pos, hits=hits)
            check_choice(gate, z, tokens, ids, weights)
            flat = torch.where((pos >= 0).repeat_interleave(KP), ids.flatten(), E).long()
            order = flat.sort(stable=True)
            live = int((flat < E).sum())
            want, count = order.indices[:live].tolist(), flat[flat < E].bincount(minlength=E)
            assert torch.equal(hits, count)
            if T <= 32:
                seen = [q for c, qs in zip(p.count.tolist(), p.pairs.tolist()) for q in qs[:c]]
                of = [e for e, c in zip(p.expert.tolist(), p.count.tolist()) for _ in range(c)]
                assert seen == want and of == order.values[:live].tolist(), (T, hash)
                assert sum(c > 0 for c in p.count.tolist()) == int(
                    (count + 7).div(8, rounding_mode="floor").sum()
                )
            else:
                assert p.pairs[:live].tolist() == want
                offsets = [0, *count.cumsum(0).tolist()]
                assert p.offsets.tolist() == offsets
                tiles = [(e, r) for e in range(E) for r in range(offsets[e], offsets[e + 1], 64)]
                assert list(zip(p.tile_expert.tolist(), p.tile_row.tolist()))[: len(tiles)] == tiles
                assert (p.tile_expert[len(tiles) :] == -1).all()
    print("router ok")


def check_others():
    for T, n in ((1, 1024), (7, 1024), (32, 4096), (100, 1024), (3, 520)):
        x, w = new(T, n + 512)[:, :n], new(n)
        y = torch.zeros((n // 8, T, 8) if T <= 32 else (T, n), device=dev, dtype=torch.float16)
        N.rms_norm(x, w, y, (8 * T, 8) if T <= 32 else (8, n), 1e-6)
        d = x.double()
        want = d * (d.square().mean(1, keepdim=True) + 1e-6).rsqrt() * w.double()
        assert worst(rows_of(y), want) < 6e-4
    for rows in (1, 5, 32):
        x = torch.randint(-9000, 9000, (rows, 129280), device=dev).float()
        want = [row.index(max(row)) for row in x.tolist()]
        assert S.greedy(x).tolist() == want
    print("norm, greedy ok")


def main():
    torch.manual_seed(int(sys.argv[1]) if len(sys.argv) > 1 else 0)
    check_router()
    check_others()
    for few in (1, 4, 8, 32):
        R.FEW = few
        for T in (1, 2, 4, 8, 16, 32):
            line = f"few {few} T {T}"
            for hash in (False, True):
                many = [inputs(T, hash) for _ in range(40)]
                hits = torch.zeros(E, dtype=torch.int64, device=dev)
                us = graph_us([lambda a=a: R.route_small(*a[:3], hits=hits) for a in many])
                line += f" {'hash' if hash else 'top6'} {us:.2f} us"
            print(line)
    for T in (33, 512, 8192):
        many = [inputs(T, False) for _ in range(4)]
        us = graph_us([lambda a=a: R.route_many(*a[:3], 64) for a in many])
        print(f"T {T:5d} route_many {us:.2f} us")
    for T in (1, 8, 32, 512, 8192):
        x, w = new(T, 2048)[:, :1024], new(1024)
        y = torch.zeros(128 * 8 * max(T, 1), device=dev, dtype=torch.float16)
        us = graph_us([lambda: N.rms_norm(x, w, y, (8 * T, 8), 1e-6)] * 40)
        print(f"T {T:5d} rms_norm 1024 {us:.2f} us, floor {T * 6144 / 3e6:.2f}")
    for rows in (1, 8, 32):
        x = new(rows, 129280)
        args = [torch.full((rows,), v, device=dev) for v in (0.8, 0.95, 0.0, 0.3)]
        us = graph_us([lambda: S.greedy(x)] * 10)
        from ds4.backends.cuda.ops import Cuda

        be, k = Cuda(), torch.zeros(rows, dtype=torch.int32, device=dev)
        t = graph_us([lambda: be.sample(x, args[0], k, *args[1:])] * 2)
        print(
            f"R {rows} greedy {us:.2f} us, floor {rows * 129280 * 4 / 3e6:.2f}; torch sample {t:.0f} us"
        )


if __name__ == "__main__":
    main()
