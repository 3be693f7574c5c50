"""Compile a Triton kernel for a GPU that is not here, and read what the assembler made of it."""

import re
import subprocess
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import ds4.backends.cuda.kernels  # noqa: F401  # says how Triton compiles
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.compiler import ASTSource
from triton.experimental.gluon._runtime import GluonASTSource, GluonJITFunction

ARCHS = 90, 120  # Hopper and consumer Blackwell

_LOAD = re.compile(r"\b(ld\.global[\w.:]*|cp\.async\.c[ag]\.shared\.global[^;]*)")
_BITS = re.compile(r"(?:\.v(\d))?\.[a-z]+(\d+)$")


@dataclass(frozen=True)
class Report:
    """What a compiled kernel takes; bytes but for `registers`, of which a thread has at most 255.

    `spills` counts stores and loads, `stack` what is kept in local memory for any reason.
    """

    registers: int
    spills: int
    stack: int
    shared: int
    ptx: str

    def count(self, pattern: str) -> int:
        """How often an instruction stands in the code: a regular expression, as r"mma\\.sync"."""
        return len(re.findall(pattern, self.ptx))

    @property
    def loads(self) -> Counter[int]:
        """Loads from global memory by their bytes a thread: 16 is the widest."""
        return Counter(_bytes(load) for load in _LOAD.findall(self.ptx))


def compile_kernel(
    fn: Any,
    signature: Mapping[str, str],
    constexprs: Mapping[str, Any],
    arch: int,
    num_warps: int = 4,
    num_stages: int = 3,
) -> Report:
    """Compile a @triton.jit or @gluon.jit function without a GPU.

    `signature` has the type of each argument that is no constexpr: "*fp16", "*u8", "i32", "fp32".
    Pointers are taken to be multiples of 16, as torch's are; an integer is if written "i32:16".
    """
    if type(fn).__name__ == "InterpretedFunction":
        raise RuntimeError("with TRITON_INTERPRET=1 nothing is compiled: run in a process without")
    types = {name: "constexpr" for name in fn.arg_names if name in constexprs}
    types |= {name: kind.removesuffix(":16") for name, kind in signature.items()}
    aligned = [name for name, kind in signature.items() if kind[0] == "*" or kind.endswith(":16")]
    kind = GluonASTSource if isinstance(fn, GluonJITFunction) else ASTSource
    source = kind(
        fn,
        {name: types[name] for name in fn.arg_names},
        dict(constexprs),
        {(fn.arg_names.index(name),): [["tt.divisibility", 16]] for name in aligned},
    )
    target = GPUTarget("cuda", arch, 32)
    kernel = triton.compile(
        source, target=target, options={"num_warps": num_warps, "num_stages": num_stages}
    )
    said = _assemble(kernel.asm["ptx"], arch)
    return Report(
        _number(r"Used (\d+) registers", said),
        _number(r"(\d+) bytes spill stores", said) + _number(r"(\d+) bytes spill loads", said),
        _number(r"(\d+) bytes stack frame", said),
        kernel.metadata.shared,
        kernel.asm["ptx"],
    )


def _assemble(ptx: str, arch: int) -> str:
    """What ptxas -v says; Triton asks it too, but does not keep the answer."""
    with TemporaryDirectory() as folder:
        source = Path(folder, "kernel.ptx")
        source.write_text(ptx)
        chip = re.search(r"\.target (\w+)", ptx)
        assert chip is not None
        command = [get_ptxas(arch).path, "-v", f"--gpu-name={chip[1]}", source, "-o", "/dev/null"]
        return subprocess.run(command, capture_output=True, text=True, check=True).stderr


def _number(pattern: str, said: str) -> int:
    return sum(int(number) for number in re.findall(pattern, said))


def _bytes(load: str) -> int:
    if load.startswith("cp.async"):  # its size is its third operand
        return int(load.split(",")[2].strip().split()[0], 0)
    wide = _BITS.search(load)
    assert wide is not None, load
    return int(wide[1] or 1) * int(wide[2]) // 8
