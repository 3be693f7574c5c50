"""Models and backends that several test files share."""

import os
import signal
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, settings

from tests import oracle

torch.set_num_threads(1)  # the models are too small for more

settings.register_profile("ds4", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("ds4")  # time never decides a test

# A job in the background inherits an ignored SIGINT, and tests press Ctrl-C.
signal.signal(signal.SIGINT, signal.default_int_handler)

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Keep the tests for Triton's interpreter, which is on or off for a process, or the rest."""
    meant: list[pytest.Item] = []
    others: list[pytest.Item] = []
    for item in items:
        marked = item.get_closest_marker("interpret") is not None
        (meant if marked == INTERPRETED else others).append(item)
    items[:] = meant
    config.hook.pytest_deselected(items=others)


if INTERPRETED:
    from triton.runtime import interpreter

    patch_whole = interpreter.InterpretedFunction.__call__
    patch_tensor = interpreter._patch_lang_tensor

    def call(self, *args, **kwargs):  # type: ignore[no-untyped-def]
        """A kernel called by a kernel: without patching the language again, which is slow."""
        if self.fn.__module__.startswith("triton."):  # its names are not patched yet
            return patch_whole(self, *args, **kwargs)
        return self.rewrite()(*args, **kwargs)

    def patch_index(tensor, scope):  # type: ignore[no-untyped-def]
        """A tensor as the bound of a loop: NumPy makes no int of an array of one any more."""
        patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    interpreter.InterpretedFunction.__call__ = call  # type: ignore[method-assign]
    interpreter._patch_lang_tensor = patch_index


BACKENDS = ("reference", "mlx", "torch")  # on a GPU "cuda" has kernels, with tests of their own
SHAPES = {"tiny": oracle.TINY, "blocky": oracle.BLOCKY, "odd": oracle.ODD}
CASES = [("tiny", 0), ("tiny", 1), ("tiny", 2), ("blocky", 0), ("odd", 0)]


class Case:
    """An oracle, its checkpoint folder, and a sequence with the oracle's logits for it."""

    def __init__(self, shape: str, seed: int, folder: Path) -> None:
        self.shape, self.seed = SHAPES[shape], seed
        self.model = oracle.make(self.shape, seed)
        self.folder = oracle.save(self.model, self.shape, folder)
        g = torch.Generator().manual_seed(100 + seed)
        self.ids = torch.randint(0, self.shape["vocab_size"], (60,), generator=g).tolist()
        self.want = oracle.logits(self.model, self.ids)


@pytest.fixture(scope="session", params=CASES, ids=lambda c: f"{c[0]}{c[1]}")
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    shape, seed = request.param
    return Case(shape, seed, tmp_path_factory.mktemp("oracle") / shape)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Case:
    return Case("tiny", 0, tmp_path_factory.mktemp("oracle") / "tiny")


@pytest.fixture(scope="session")
def blocky(tmp_path_factory: pytest.TempPathFactory) -> Case:
    return Case("blocky", 0, tmp_path_factory.mktemp("oracle") / "blocky")


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> str:
    return request.param
