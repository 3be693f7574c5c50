"""Kernels compiled ahead: launches do nothing but compile, in this thread only."""

import threading
from typing import Any

import pytest
import torch

triton = pytest.importorskip("triton", reason="the kernels' package needs triton")
import triton.language as tl  # noqa: E402
from ds4.backends.cuda import nvrtc  # noqa: E402
from ds4.backends.cuda.ahead import compile_only  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.runtime import driver  # noqa: E402
from triton.runtime.jit import JITFunction  # noqa: E402

DEVICE = 77  # no other test's


class Driver:
    def get_current_device(self) -> int:
        return DEVICE

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)


@triton.jit
def _one(x, N: tl.constexpr):  # type: ignore[no-untyped-def]
    tl.store(x + tl.arange(0, N), 1.0)


@triton.jit
def _wrong(x, N: tl.constexpr):  # type: ignore[no-untyped-def]
    tl.store(x + tl.arange(0, N + 1), 1.0)  # no power of two


def test_triton_kernels_are_compiled_and_not_run(monkeypatch: pytest.MonkeyPatch) -> None:
    x, before = torch.zeros(8), JITFunction.run
    monkeypatch.setattr(driver, "_active", Driver(), raising=False)
    with compile_only():
        _one[(1,)](x, N=4)
        _one[(1,)](x, N=8)
        _one[(1,)](x, N=4)
        _wrong[(1,)](x, N=4)
    kernels = _one.device_caches[DEVICE][0]
    assert sorted(k.metadata.name for k in kernels.values()) == ["_one", "_one"]
    assert len(_wrong.device_caches[DEVICE][0]) == 0
    assert not x.any()
    assert JITFunction.run is before
    with compile_only():  # the mode was left
        pass


def test_other_threads_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[bool] = []

    def run(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        seen.append(warmup)

    monkeypatch.setattr(JITFunction, "run", run)
    with compile_only():
        _one[(1,)](None, N=4)
        other = threading.Thread(target=lambda: _one[(1,)](None, N=4))
        other.start()
        other.join()
    _one[(1,)](None, N=4)
    assert seen == [True, False, False]


def test_cuda_kernels_are_compiled_once_and_loaded_when_launched(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    compiled: list[str] = []
    monkeypatch.setattr(nvrtc, "_architecture", lambda: "sm_90")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(nvrtc, "_cached", lambda source, options: compiled.append(source) or b"")
    kernel = nvrtc.Module("source").kernel("name")
    assert compiled == []
    with compile_only():
        kernel((1, 1, 1), 32)
        kernel((1, 1, 1), 32)
    assert compiled == ["source"]
    monkeypatch.setattr(nvrtc.Module, "function", lambda *_: pytest.fail("reached the driver"))
    with pytest.raises(pytest.fail.Exception):
        kernel((1, 1, 1), 32)
