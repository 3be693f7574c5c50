"""The backend of kernels without a GPU: every launch is checked and counted, none is run.

Tensors lie on the CPU, whatever device is asked for; results are whatever memory holds (zeros). So
all of the backend's Python is gone through, as on an H100: which kernel is launched, with which
arguments, on which grid.
"""

from collections import Counter
from collections.abc import Callable
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from ds4.backends.cuda import graph, nvrtc, synthetic
from torch.overrides import TorchFunctionMode
from triton.runtime.jit import JITFunction

H100 = SimpleNamespace(
    name="NVIDIA H100",
    multi_processor_count=132,
    total_memory=85_000_000_000,
    shared_memory_per_block_optin=232_448,
    shared_memory_per_multiprocessor=233_472,
    L2_cache_size=50 << 20,
    major=9,
    minor=0,
)
ZEROS: dict[Any, Any] = {
    torch.empty: torch.zeros,
    torch.empty_like: torch.zeros_like,
    torch.Tensor.new_empty: torch.Tensor.new_zeros,
}
OPTIONS = {"num_warps", "num_stages", "num_ctas", "maxnreg", "launch_pdl"}  # of a launch in Triton


class _Stream:
    """Of an event and a graph, too, what the backend calls."""

    cuda_stream = 0

    def __init__(self, *_: Any, **__: Any) -> None: ...

    def nothing(self, *_: Any, **__: Any) -> None: ...

    synchronize = wait_stream = wait_event = record_event = record = wait = replay = nothing


class _OnCpu(TorchFunctionMode):
    """Puts on the CPU what is meant for a GPU, and lets new tensors be zeros."""

    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        del types
        kwargs = {k: _place(v) for k, v in (kwargs or {}).items() if k != "pin_memory"}
        function = ZEROS.get(function, function)
        return function(*map(_place, args), **kwargs)


def _place(x: Any) -> Any:
    cuda = isinstance(x, str | torch.device) and str(x).startswith("cuda")
    return torch.device("cpu") if cuda else x


def pretend(patch: pytest.MonkeyPatch) -> tuple[TorchFunctionMode, Counter[str]]:
    """A mode to work in, and how often each kernel was launched."""
    launches: Counter[str] = Counter()

    def triton_launch(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        del warmup
        given = {name: x for name, x in kwargs.items() if name not in OPTIONS}
        bound = self.signature.bind(*args, **given)
        bound.apply_defaults()
        sizes = grid(bound.arguments) if callable(grid) else grid
        assert all(size > 0 for size in sizes), (self.__name__, sizes)
        launches[self.__name__] += 1

    def cuda_launch(self: Any, grid: Any, threads: int, *arguments: Any) -> None:
        del arguments
        assert all(size > 0 for size in grid), (self._name, grid)
        assert 0 < threads <= 1024, (self._name, threads)
        launches[self._name] += 1

    def empty(maker: Any, nbytes: int) -> torch.Tensor:
        return torch.zeros(nbytes, dtype=torch.uint8, device=maker.device)

    patch.setattr(JITFunction, "run", triton_launch)
    patch.setattr(nvrtc.Kernel, "__call__", cuda_launch)
    patch.setattr(graph, "compile_only", ahead_of_nothing)
    patch.setattr(synthetic._Torch, "empty", empty)
    for name, value in _cuda().items():
        patch.setattr(torch.cuda, name, value)
    return _OnCpu(), launches


def ahead_of_nothing() -> Any:
    """Instead of compiling: a step's launches are counted once, when it runs."""
    raise RuntimeError("nothing is compiled")


def _cuda() -> dict[str, Any]:
    def always(x: Any) -> Callable[..., Any]:
        return lambda *_, **__: x

    names: dict[str, Any] = dict.fromkeys(("Stream", "Event", "CUDAGraph"), _Stream)
    names |= dict.fromkeys(("graph", "stream", "device"), lambda *_, **__: nullcontext())
    names |= dict.fromkeys(("current_stream", "default_stream"), always(_Stream()))
    names |= dict.fromkeys(("synchronize", "set_device", "empty_cache"), always(None))
    names |= {
        "is_available": always(True),
        "device_count": always(1),
        "current_device": always(0),
        "get_device_capability": always((9, 0)),
        "get_device_properties": always(H100),
        "graph_pool_handle": always((0, 0)),
        "mem_get_info": always((84_000_000_000, H100.total_memory)),
        "is_current_stream_capturing": always(False),
    }
    return names
