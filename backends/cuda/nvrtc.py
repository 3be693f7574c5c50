"""CUDA C++ compiled when first needed, by the NVRTC library that PyTorch brings along.

For the few kernels that Triton cannot say. Compiled code is kept in ~/.cache/ds4/kernels.
"""

import ctypes
import functools
import hashlib
import importlib.util
import os
import tempfile
from collections.abc import Sequence
from concurrent.futures import Executor
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import torch

from ds4.errors import BackendError

CACHE = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "ds4" / "kernels"
_DYNAMIC_SHARED = 8  # CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
_PROGRAMMATIC_SERIALIZATION = 6  # CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION


compiling: ContextVar[Executor | None] = ContextVar("compiling", default=None)  # see ahead.py


class Module:
    """Kernels of one source for the current device; compiled when one is first launched."""

    def __init__(self, source: str, options: Sequence[str] = ()) -> None:
        self._source = source
        self._options = f"--gpu-architecture={_architecture()}", *options
        self._handle: ctypes.c_void_p | None = None
        self._overlaps = torch.cuda.get_device_capability()[0] >= 9

    def compile(self) -> bytes:
        """Machine code, kept for the next time."""
        return _cached(self._source, self._options)

    def kernel(self, name: str, shared: int = 0) -> "Kernel":
        """`shared`: bytes of dynamic shared memory that each block gets."""
        return Kernel(self, name, self._overlaps, shared)

    def function(self, name: str, shared: int) -> ctypes.c_void_p:
        """The driver's handle of a kernel."""
        if self._handle is None:
            cubin, handle = self.compile(), ctypes.c_void_p()
            torch.cuda.current_stream()  # makes the context current
            self._cubin = ctypes.create_string_buffer(cubin, len(cubin))
            _check(_driver().cuModuleLoadData(ctypes.byref(handle), self._cubin), "cuModuleLoad")
            self._handle = handle
        function = ctypes.c_void_p()
        found = _driver().cuModuleGetFunction(ctypes.byref(function), self._handle, name.encode())
        _check(found, name)
        if shared:
            _check(_driver().cuFuncSetAttribute(function, _DYNAMIC_SHARED, shared), name)
        return function


class Kernel:
    """Launched on PyTorch's current stream; arguments are ctypes values.

    Where the GPU can (sm_90 and later) a launch starts while the kernel before it ends: every
    kernel of a Module therefore waits (griddepcontrol.wait) before it reads what others wrote.
    """

    def __init__(self, module: Module, name: str, overlaps: bool, shared: int) -> None:
        self._module, self._name, self._shared = module, name, shared
        self._function: ctypes.c_void_p | None = None
        self._attribute = _Attribute(_PROGRAMMATIC_SERIALIZATION, value=(ctypes.c_int * 16)(1))
        self._attributes = 1 if overlaps else 0
        self._asked = False
        self._device = 0

    def __call__(self, grid: tuple[int, int, int], threads: int, *arguments: Any) -> None:
        if (pool := compiling.get()) is not None:
            if not self._asked and self._function is None:
                self._asked = True
                pool.submit(self._module.compile)
            return
        if self._function is None:
            self._function = self._module.function(self._name, self._shared)
            self._device = torch.cuda.current_device()
        config = _LaunchConfig(
            *grid,
            *(threads, 1, 1),
            self._shared,
            _current_stream(self._device),
            ctypes.pointer(self._attribute),
            self._attributes,
        )
        pointers = (ctypes.c_void_p * len(arguments))(
            *(ctypes.addressof(argument) for argument in arguments)
        )
        launched = _driver().cuLaunchKernelEx(ctypes.byref(config), self._function, pointers, None)
        _check(launched, "cuLaunchKernelEx")


def _current_stream(device: int) -> int:
    """In a tenth of the time that torch.cuda.current_stream takes: a prompt asks 900 times."""
    stream: int = torch._C._cuda_getCurrentRawStream(device)
    return stream


class _Attribute(ctypes.Structure):
    _fields_ = (("id", ctypes.c_int), ("pad", ctypes.c_int), ("value", ctypes.c_int * 16))

    def __init__(self, id: int, value: Any) -> None:
        super().__init__(id, 0, value)


class _LaunchConfig(ctypes.Structure):
    _fields_ = (
        *((f"grid_{axis}", ctypes.c_uint) for axis in "xyz"),
        *((f"block_{axis}", ctypes.c_uint) for axis in "xyz"),
        ("shared", ctypes.c_uint),
        ("stream", ctypes.c_void_p),
        ("attributes", ctypes.POINTER(_Attribute)),
        ("count", ctypes.c_uint),
    )


def compile(source: str, options: Sequence[str]) -> bytes:
    """Machine code of a source. Raises BackendError with the compiler's words."""
    library = _library()
    program, size = ctypes.c_void_p(), ctypes.c_size_t()
    library.nvrtcCreateProgram(ctypes.byref(program), source.encode(), b"kernels.cu", 0, None, None)
    words = [option.encode() for option in ("--std=c++17", *options)]
    failed = library.nvrtcCompileProgram(
        program, len(words), (ctypes.c_char_p * len(words))(*words)
    )
    if failed:
        library.nvrtcGetProgramLogSize(program, ctypes.byref(size))
        log = ctypes.create_string_buffer(size.value)
        library.nvrtcGetProgramLog(program, log)
        raise BackendError(f"a CUDA kernel does not compile: {log.value.decode()}")
    library.nvrtcGetCUBINSize(program, ctypes.byref(size))
    code = ctypes.create_string_buffer(size.value)
    library.nvrtcGetCUBIN(program, code)
    library.nvrtcDestroyProgram(ctypes.byref(program))
    return code.raw


def _cached(source: str, options: tuple[str, ...]) -> bytes:
    major, minor = ctypes.c_int(), ctypes.c_int()
    _library().nvrtcVersion(ctypes.byref(major), ctypes.byref(minor))
    key = repr((source, options, major.value, minor.value)).encode()
    path = CACHE / f"{hashlib.sha256(key).hexdigest()[:32]}.cubin"
    if path.exists():
        return path.read_bytes()
    code = compile(source, options)
    CACHE.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=CACHE, delete=False) as file:
        file.write(code)
    os.replace(file.name, path)
    return code


def _architecture() -> str:
    major, minor = torch.cuda.get_device_capability()
    return f"sm_{major}{minor}" + ("a" if (major, minor) == (9, 0) else "")  # a: wgmma


@functools.cache
def _library() -> ctypes.CDLL:
    """NVRTC from PyTorch's own packages, else the system's."""
    spec = importlib.util.find_spec("nvidia")
    roots = [Path(root) for root in (spec.submodule_search_locations or [])] if spec else []
    found = [str(path) for root in roots for path in sorted(root.glob("*/lib/libnvrtc.so.*[0-9]"))]
    found += ["libnvrtc.so.13", "libnvrtc.so.12", "libnvrtc.so"]
    for name in found:
        if "builtins" not in name and "alt" not in name:
            try:
                for needed in Path(name).parent.glob("libnvrtc-builtins.so*"):
                    ctypes.CDLL(str(needed))  # which NVRTC looks for by name only
                return ctypes.CDLL(name)
            except OSError:
                continue
    raise BackendError("libnvrtc was not found: pip install 'ds4[cuda]' with a CUDA build of torch")


@functools.cache
def _driver() -> ctypes.CDLL:
    return ctypes.CDLL("libcuda.so.1")


def _check(result: int, what: str) -> None:
    if result:
        name = ctypes.c_char_p()
        _driver().cuGetErrorString(result, ctypes.byref(name))
        raise BackendError(f"{what}: CUDA says {(name.value or b'?').decode()}")
