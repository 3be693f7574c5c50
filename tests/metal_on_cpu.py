"""Runs a Metal kernel's text on the CPU, through a C++ compiler: what it computes, not how fast.

mx.fast.metal_kernel adds a signature to a kernel's text; `launch` does the same in C++ over
metal_on_cpu.h. A text that passes has no slip of the pen and the right arithmetic; Metal's own
compiler, its rounding and its memory rules it has not seen.
"""

import ctypes
import functools
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from ds4.backends.mlx.kernels.launch import Constant, Launch, Source

HEADER = Path(__file__).with_name("metal_on_cpu.h")
_C = {
    mx.float32: "float",
    mx.int32: "int",
    mx.int64: "long",
    mx.uint32: "uint",
    mx.uint8: "uchar",
    mx.bfloat16: "bfloat16_t",
}
_NUMPY = {mx.float32: np.float32, mx.uint32: np.uint32, mx.bfloat16: np.uint16}


def launch(
    source: Source, constants: Mapping[str, Constant], arrays: Sequence[mx.array], how: Launch
) -> list[mx.array]:
    """What kernels.launch.launch does on a Mac."""
    types = tuple(_C[array.dtype] for array in arrays)
    out_types = tuple(_C[dtype] for dtype in how.dtypes)
    run = _compiled(source, tuple(constants.items()), types, out_types)
    inputs = [_host(array) for array in arrays]
    outputs = [
        np.full(shape, 77, _NUMPY[dtype])  # a value that nothing may be mistaken for
        for shape, dtype in zip(how.shapes, how.dtypes, strict=True)
    ]
    shapes = [np.array(array.shape, np.int32) for array in arrays]
    pointers = (ctypes.c_void_p * (2 * len(inputs) + len(outputs)))(
        *(x.ctypes.data for x in [*inputs, *shapes, *outputs])
    )
    run(pointers, *how.groups, how.threads)
    return [_back(x, dtype) for x, dtype in zip(outputs, how.dtypes, strict=True)]


def _back(x: np.ndarray, dtype: Any) -> mx.array:
    return mx.array(x).view(mx.bfloat16) if dtype == mx.bfloat16 else mx.array(x)


def _host(array: mx.array) -> np.ndarray:
    bits = array.view(mx.uint16) if array.dtype == mx.bfloat16 else array
    return np.ascontiguousarray(np.array(bits))


@functools.cache
def _compiled(
    source: Source,
    constants: tuple[tuple[str, Constant], ...],
    types: tuple[str, ...],
    out_types: tuple[str, ...],
) -> Any:
    program = _program(source, dict(constants), types, out_types)
    folder = Path(tempfile.mkdtemp(prefix="ds4-metal-"))
    (folder / "kernel.cpp").write_text(program)
    library = folder / "kernel.so"
    command = ["g++", "-std=c++17", "-O0", "-shared", "-fPIC", "-ffp-contract=off"]
    subprocess.run([*command, "-o", library, folder / "kernel.cpp"], check=True)
    return ctypes.CDLL(str(library)).run


def _program(
    source: Source,
    constants: Mapping[str, Constant],
    types: tuple[str, ...],
    out_types: tuple[str, ...],
) -> str:
    count = len(source.inputs)
    lines = [f'#include "{HEADER}"', source.header, "static void** arrays;"]
    lines.append("static void kernel(uint3 thread_position_in_threadgroup,")
    lines.append("                   uint3 threadgroup_position_in_grid) {")
    lines.append("uint thread_index_in_simdgroup = thread_position_in_threadgroup.x % 32;")
    lines.append("uint simdgroup_index_in_threadgroup = thread_position_in_threadgroup.x / 32;")
    for i, (name, kind) in enumerate(zip(source.inputs, types, strict=True)):
        lines.append(f"const {kind}* {name} = (const {kind}*)arrays[{i}];")
        lines.append(f"const int* {name}_shape = (const int*)arrays[{count + i}];")
    for i, (name, kind) in enumerate(zip(source.outputs, out_types, strict=True)):
        lines.append(f"{kind}* {name} = ({kind}*)arrays[{2 * count + i}];")
    lines += [source.text(constants), "}"]
    lines.append('extern "C" void run(void** given, uint across, uint down, uint threads) {')
    lines.append("arrays = given; body = kernel;")
    lines.append("for (uint y = 0; y < down; y++) for (uint x = 0; x < across; x++)")
    lines.append("run_group(threads, {x, y, 0}); }")
    return "\n".join(lines)
