"""Metal kernels from small texts. Nothing here runs off a Mac: see docs/mac.md."""

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx

Constant = int | float | bool


@dataclass(frozen=True)
class Source:
    """The body of a kernel: what mx.fast.metal_kernel calls its source.

    Constants come before it as C++ constants, so a text is complete, and checked, by itself.
    """

    name: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    body: str
    header: str = ""

    def text(self, constants: Mapping[str, Constant]) -> str:
        return "".join(_declared(*item) for item in constants.items()) + self.body


def _declared(name: str, value: Constant) -> str:
    if isinstance(value, float):
        return f"constexpr float {name} = {value!r}f;\n"
    return f"constexpr int {name} = {int(value)};\n"


@dataclass(frozen=True)
class Launch:
    """One use of a kernel: `groups` threadgroups of `threads` threads, and what it writes."""

    groups: tuple[int, int]
    threads: int
    shapes: Sequence[tuple[int, ...]]
    dtypes: Sequence[Any]


def launch(
    source: Source, constants: Mapping[str, Constant], arrays: Sequence[mx.array], how: Launch
) -> list[mx.array]:
    """Enqueue a kernel; its outputs."""
    kernel = _kernel(source, tuple(constants.items()))
    across, down = how.groups
    outputs: list[mx.array] = kernel(
        inputs=list(arrays),
        grid=(across * how.threads, down, 1),
        threadgroup=(how.threads, 1, 1),
        output_shapes=list(how.shapes),
        output_dtypes=list(how.dtypes),
    )
    return outputs


@functools.cache
def _kernel(source: Source, constants: tuple[tuple[str, Constant], ...]) -> Any:
    values = "_".join(str(value).translate(_NAME) for _, value in constants)
    return mx.fast.metal_kernel(
        name=f"ds4_{source.name}_{values}",
        input_names=list(source.inputs),
        output_names=list(source.outputs),
        source=source.text(dict(constants)),
        header=source.header,
    )


_NAME = str.maketrans({".": "p", "-": "m", "+": "p"})
