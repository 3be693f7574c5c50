"""The kernel that decides which experts a GPU holds, on the CPU, beside the rule in policy.py."""

import ctypes

import numpy as np
import pytest

from tests.cuda_block import cuda_block

torch = pytest.importorskip("torch")
policy = pytest.importorskip("ds4.backends.cuda.placement.policy")
from ds4.backends.cuda.placement import kernel as place_kernel  # noqa: E402
from ds4.backends.cuda.placement.layer import MATRICES  # noqa: E402
from ds4.backends.cuda.placement.lent import Lent  # noqa: E402
from ds4.backends.cuda.placement.tables import Tables  # noqa: E402

from tests.test_placement import layer_of  # noqa: E402


@pytest.fixture(scope="module")
def block(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    flags = [*place_kernel.options()[1:], "-DPLACEMENT"]
    return cuda_block(place_kernel.source(), 256, flags, tmp_path_factory.mktemp("place"))


@pytest.mark.parametrize(
    ("slots", "homes", "lent"), [(7, 16, 0), (9, 11, 3), (2, 14, 5), (16, 16, 0)]
)
def test_the_kernel_follows_the_rule(block: ctypes.CDLL, slots: int, homes: int, lent: int) -> None:
    """Same places, scores and counts as policy.py; bytes where the addresses say."""
    experts, rng = 16, np.random.default_rng(slots)
    state = policy.first_state(rng.integers(0, 3, experts), slots, homes, lent=lent)
    memory = Lent(4096, "cpu")
    layer, blobs = layer_of(state, lent=memory)
    tables = Tables([state], "cpu")
    for m in MATRICES:
        tables.point(layer, m, state)
    arguments, wanted = tables.arguments(layer), tables.states()[0]
    for turn in range(20):
        if turn in (6, 12, 16):  # comes, goes, comes again
            (memory.give if turn == 12 else memory.take)()
            tables.set_lent([layer], memory.there)
            policy.set_lent(wanted, layer.kept, memory.there)
        picks = rng.choice(experts, rng.integers(1, 9), replace=True)
        chosen, pairs = (x.astype(np.int32) for x in np.unique(picks, return_counts=True))
        tiles = sorted([*chosen.tolist(), int(chosen[0])])  # one expert has two tiles
        counts = [1 if i == 0 else int(pairs[list(chosen).index(e)]) for i, e in enumerate(tiles)]
        pairs[0] += 1
        expert, count = (np.int32([*x, 0, 0]) for x in (tiles, counts))
        pointers = (ctypes.c_void_p(x.ctypes.data) for x in (expert, count))
        block.run(ctypes.byref(arguments), *pointers, len(expert))
        policy.decide(wanted, chosen, pairs)
        found = tables.states()[0]
        for name, x in vars(wanted).items():
            np.testing.assert_array_equal(getattr(found, name), x, err_msg=name)
        assert (tables.arrived == 1).all()
        for i, m in enumerate(MATRICES):
            size = blobs[m].shape[1]
            for e, at in enumerate(tables.ptrs[0, i].tolist()):
                assert ctypes.string_at(at, size) == blobs[m][e].tobytes()
