"""CUDA C++ without a GPU: a kernel run on the CPU, and what the assembler says about one."""

import ctypes
import re
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest


def cuda_block(
    source: str, threads: int, options: Sequence[str], folder: Path, main: str = "cuda_block.cpp"
) -> ctypes.CDLL:
    """A library whose `run` (cuda_block.cpp) runs a kernel's blocks one after another."""
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("needs g++")
    kernel, library = folder / "kernel.cu", folder / "block.so"
    kernel.write_text(source)
    words = [f'-DSOURCE="{kernel}"', f"-DTHREADS={threads}", *options]
    words += ["-std=c++17", "-O1", "-w", "-ffp-contract=off", "-shared", "-fPIC"]
    words += ["-U_FORTIFY_SOURCE"]  # it takes a jump to another fiber's stack for an attack
    here = str(Path(__file__).with_name(main))
    subprocess.run([compiler, *dict.fromkeys(words), here, "-o", str(library)], check=True)
    return ctypes.CDLL(str(library))


def spilled(source: str, options: Sequence[str], arch: int, folder: Path) -> int:
    """Bytes of registers that the compiler spilled."""
    kernel = folder / "kernel.cu"
    kernel.write_text(source)
    command = ["nvcc", f"-arch=sm_{arch}", "-Xptxas", "-v", "-cubin", *options, str(kernel)]
    command += ["-o", str(folder / "kernel.cubin")]
    said = subprocess.run(command, check=True, capture_output=True, text=True).stderr
    return sum(int(n) for n in re.findall(r"(\d+) bytes spill", said))
