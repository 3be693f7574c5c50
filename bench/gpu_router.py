"""Router, norm and greedy choice on a GPU: checked, or timed in CUDA graphs.

python -m bench.gpu_router [check]
"""

import random

import torch
from ds4.backends.cuda.kernels import norm as N
from ds4.backends.cuda.kernels import router as R
from ds4.backends.cuda.kernels import sample as S

from bench.gpu_hyper import graph_us, new, rows_of, worst
from bench.machine import named_parts

E, KP, V, dev = 256, 6, 129280, "cuda"


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
    for T in (1, 2, 3, 4, 5, 13, 32, 33, 511, 8192, 16384):
        for hash in (False, True):
            gate, z, tokens, pos = inputs(T, hash)
            hits = torch.zeros(E, dtype=torch.int64, device=dev)
            if T <= R.SMALL:
                ids, weights, order = R.route_small(gate, z, tokens, pos=pos, hits=hits)
            else:
                ids, weights, order = R.route_many(gate, z, tokens, 64, pos=pos, hits=hits)
            check_choice(gate, z, tokens, ids, weights)
            flat = torch.where((pos >= 0).repeat_interleave(KP), ids.flatten(), E).long()
            counts = flat[flat < E].bincount(minlength=E)
            assert torch.equal(hits, counts)
            pairs = flat.sort(stable=True).indices[: int(counts.sum())].tolist()
            (check_tiles if T <= R.SMALL else check_sorted)(order, pairs, flat, counts)
    print("router ok")


def check_tiles(tiles, pairs, flat, counts):
    """Tiles hold the pairs in order of expert, at most 8 of one expert each, no tile too many."""
    each = zip(tiles.expert.tolist(), tiles.count.tolist(), tiles.pairs.tolist(), strict=True)
    work = [(expert, some[:count]) for expert, count, some in each]
    assert [pair for _, some in work for pair in some] == pairs
    assert all(flat[pair] == expert for expert, some in work for pair in some)
    assert sum(bool(some) for _, some in work) == int(-(-counts // 8).sum())


def check_sorted(plan, pairs, flat, counts):
    assert plan.pairs[: len(pairs)].tolist() == pairs
    offsets = [0, *counts.cumsum(0).tolist()]
    assert plan.offsets.tolist() == offsets
    tiles = [(e, row) for e in range(E) for row in range(offsets[e], offsets[e + 1], 64)]
    found = list(zip(plan.tile_expert.tolist(), plan.tile_row.tolist(), strict=True))
    assert found[: len(tiles)] == tiles
    assert all(expert == -1 for expert, _ in found[len(tiles) :])


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


def time_router():
    for few in (2, 8):
        R.FEW = few
        for T in (1, 4, 8, 32):
            line = f"few {few} T {T:5d} route_small"
            for hash in (False, True):
                many = [inputs(T, hash) for _ in range(40)]
                hits = torch.zeros(E, dtype=torch.int64, device=dev)
                us = graph_us([lambda a=a, n=hits: R.route_small(*a[:3], hits=n) for a in many])
                line += f" {'table' if hash else 'top 6'} {us:.2f} us"
            print(line)
    for T in (64, 512, 8192):
        many = [inputs(T, False) for _ in range(4)]
        us = graph_us([lambda a=a: R.route_many(*a[:3], 64) for a in many])
        print(f"T {T:5d} route_many {us:.2f} us")


def time_others():
    for T in (1, 8, 32, 8192):
        x, w = new(T, 2048)[:, :1024], new(1024)
        y = torch.zeros(T * 1024, device=dev, dtype=torch.float16)
        us = graph_us([lambda a=(x, w, y, (8 * T, 8), 1e-6): N.rms_norm(*a)] * 40)
        print(f"T {T:5d} rms_norm 1024 {us:.2f} us, floor {T * 6144 / 3e6:.2f}")
    for rows in (1, 8, 32):
        x = new(rows, V)
        us = graph_us([lambda x=x: S.greedy(x)] * 10)
        print(f"R {rows:5d} greedy {us:.2f} us, floor {rows * V * 4 / 3e6:.2f}")


if __name__ == "__main__":
    given = named_parts(__doc__, "check")
    torch.manual_seed(random.randrange(1 << 30))
    if given:
        check_router()
        check_others()
    else:
        time_router()
        time_others()
