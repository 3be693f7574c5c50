"""The CUDA backend's router and its order of expert work, interpreted and compiled."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from ds4.backends.reference.ops import Reference

pytest.importorskip("triton")

from ds4.backends.cuda.kernels import router
from ds4.backends.cuda.kernels import router_kernels as kernels
from ds4.backends.cuda.kernels.split import Split

E, K, V, BLOCK = 24, 6, 40, 8


def case(tokens: int, hashed: bool) -> tuple[router.Gate, torch.Tensor, torch.Tensor, torch.Tensor]:
    """A gate and logits with ties and extremes, token ids, and positions with padding."""
    rng = np.random.default_rng(tokens)
    z = torch.from_numpy(rng.standard_normal((tokens, 2 * E))).float()[:, :E] * 3
    z[:, 3:9] = z[:, 3:4]
    z[-1, 10:13] = torch.tensor([-80.0, 80, -20])
    bias = torch.from_numpy(rng.standard_normal(E)).float() / 4
    bias[3:9] = 1.5
    table = torch.from_numpy(rng.integers(0, E, (V, K))) if hashed else None
    held = torch.arange(E, dtype=torch.int32) % 3 % 2 if tokens in (5, 50) else None
    gate = router.Gate(None if hashed else bias, table, E, K, 1.5, held)
    pos = torch.arange(tokens, dtype=torch.int32)
    pos[1::7] = -1
    return gate, z, torch.from_numpy(rng.integers(0, V, tokens, np.int32)), pos


def wanted(
    gate: router.Gate, z: torch.Tensor, tokens: torch.Tensor
) -> tuple[np.ndarray, np.ndarray]:
    bias, table = (None if x is None else x.numpy() for x in (gate.bias, gate.table))
    w = SimpleNamespace(weight=np.eye(E, dtype=np.float32), bias=bias, tid2eid=table)
    cfg = SimpleNamespace(num_experts_per_tok=K, routed_scaling_factor=gate.factor)
    step = SimpleNamespace(tokens=tokens.numpy())
    return Reference().route(w, z.numpy(), step, cfg)


def pairs_by_expert(gate: router.Gate, ids: np.ndarray, pos: torch.Tensor) -> list[list[int]]:
    """The pairs of each expert that is here, in order, without those of padding."""
    pairs: list[list[int]] = [[] for _ in range(E)]
    for pair, expert in enumerate(ids.flatten()):
        if pos[pair // K] >= 0 and (gate.held is None or gate.held[expert]):
            pairs[expert].append(pair)
    return pairs


@pytest.mark.interpret
@pytest.mark.parametrize("hashed", [False, True])
@pytest.mark.parametrize("tokens", [1, 5, 32])
def test_small(tokens: int, hashed: bool) -> None:
    gate, z, ids, pos = case(tokens, hashed)
    hits = torch.full((E,), 7)
    found, weights, tiles = router.route_small(gate, z, ids, pos=pos, hits=hits)
    want, want_weights = wanted(gate, z, ids)
    np.testing.assert_array_equal(found, want)
    np.testing.assert_allclose(weights, want_weights, rtol=2e-6, atol=1e-9)
    pairs = pairs_by_expert(gate, want, pos)
    work = [(e, some[i : i + 8]) for e, some in enumerate(pairs) for i in range(0, len(some), 8)]
    rest = [(0, [])] * (tokens * K - len(work))
    each = zip(tiles.expert.tolist(), tiles.pairs.tolist(), tiles.count.tolist(), strict=True)
    assert [(e, some[:count]) for e, some, count in each] == work + rest
    assert (hits - 7).tolist() == [len(some) for some in pairs]


@pytest.mark.interpret
@pytest.mark.parametrize("tokens", [33, 50])
def test_many(tokens: int) -> None:
    gate, z, ids, pos = case(tokens, tokens == 50)
    hits = torch.full((E,), 7)
    found, weights, plan = router.route_many(gate, z, ids, BLOCK, pos=pos, hits=hits)
    want, want_weights = wanted(gate, z, ids)
    np.testing.assert_array_equal(found, want)
    np.testing.assert_allclose(weights, want_weights, rtol=2e-6, atol=1e-9)
    pairs = pairs_by_expert(gate, want, pos)
    offsets = np.cumsum([0, *map(len, pairs)]).tolist()
    assert plan.offsets.tolist() == offsets
    assert plan.pairs[: offsets[-1]].tolist() == [pair for some in pairs for pair in some]
    work = [(e, r) for e in range(E) for r in range(offsets[e], offsets[e + 1], BLOCK)]
    rest = [(-1, 0)] * (len(plan.tile_row) - len(work))
    assert [*zip(plan.tile_expert.tolist(), plan.tile_row.tolist(), strict=True)] == work + rest
    assert (hits - 7).tolist() == [len(some) for some in pairs]


@pytest.mark.interpret
@pytest.mark.parametrize("first", [True, False])
def test_a_sum_over_the_experts_that_are_here(first: bool) -> None:
    g = torch.Generator().manual_seed(3)
    each, base = torch.randn(5 * K, 36, generator=g), torch.randn(5, 36, generator=g)
    ids = torch.randint(0, E, (5, K), generator=g, dtype=torch.int32)
    held = torch.arange(E, dtype=torch.int32) % 2
    here = held[ids.long()].flatten() == 1
    want = torch.where(here[:, None], each, 0).view(5, K, 36).sum(1) + (base if first else 0)
    each[~here] = torch.nan  # nobody wrote these
    out = torch.empty(5, 36)
    Split(held, ids, first, 2).add_up(each, base if first else None, out)
    torch.testing.assert_close(out, want)


SIGNATURE = {"z": "*fp32", "z_row": "i32:16", "bias": "*fp32", "table": "*i64", "weights": "*fp32"}
SIGNATURE |= dict.fromkeys(["tokens", "pos", "held", "ids", "counts", "totals", "pairs"], "*i32")
SIGNATURE |= dict.fromkeys(["offsets", "tile_expert", "tile_count", "tile_pairs"], "*i32")
SIGNATURE |= {"tile_row": "*i32", "hits": "*i64", "factor": "fp32"}
SIGNATURE |= dict.fromkeys(["T", "N", "tiles"], "i32")
SHAPE = {"E": 256, "EP": 256, "K": 6, "KP": 8}
FLAGS = {
    "HASH": False,
    "PADDED": True,
    "SPLIT": True,
    "COUNT": True,
    "CHOOSE": True,
    "ORDER": True,
    "HOLDS": 8,
    "EARLY": True,
}
KERNELS = {
    "one": (kernels.route_small_kernel, {"BT": 1, "BP": 8, "STEP": 8, "T": 1}, 1),
    "few": (kernels.route_small_kernel, {"BT": 4, "BP": 32, "STEP": 32}, 4),
    "order": (kernels.route_small_kernel, {"BT": 1, "BP": 256, "STEP": 32, "CHOOSE": False}, 8),
    "many": (kernels.choose_and_count, {"BT": 16, "BP": 128}, 8),
    "sums": (kernels.add_up, {"BE": 16, "BN": 128}, 4),
    "sort": (kernels.sort_pairs, {"BT": 16, "BP": 128, "STEP": 32, "ROWS": 64}, 4),
}


@pytest.mark.parametrize("arch", [90, 120])
@pytest.mark.parametrize("kernel", KERNELS)
def test_compiled(kernel: str, arch: int) -> None:
    from tests.triton_compile import compile_kernel

    fn, constants, warps = KERNELS[kernel]
    constants = {k: v for k, v in (SHAPE | FLAGS | constants).items() if k in fn.arg_names}
    types = {k: v for k, v in SIGNATURE.items() if k in fn.arg_names and k not in constants}
    report = compile_kernel(fn, types, constants, arch, warps)
    assert report.spills == 0
    if kernel == "one":
        assert report.count(r"redux\.sync\.max") == 6
