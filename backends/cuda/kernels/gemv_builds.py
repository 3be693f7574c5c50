"""How gemv.cu is compiled for matrices: what it is told of their formats and shapes."""

from collections.abc import Sequence
from dataclasses import dataclass

from ..qmatrix import QMatrix
from .gemv_arguments import FORMATS, format_name

TILE = 8  # tokens a tensor core takes at once
_USUAL = 8192  # channels for which one token's kernels are compiled, if no row is longer
_ROOM = 1 << 15  # bytes of shared memory for pairs' inputs, unless two need more: loads need L1
_FEW_ROOM = 4 * 64 * 8 * 16  # bytes for the sums of gemv_few.cu
_BLOCKS = dict(zip(FORMATS, (64, 128, 128, 256, 128, 128, 128, 128, 128), strict=True))


def block_of(m: QMatrix) -> int:
    """Channels that a warp multiplies at a time, of 2 tokens or more."""
    return _BLOCKS[format_name(m).partition("+")[0]]


@dataclass(frozen=True)
class Build:
    """How gemv.cu is compiled and launched."""

    options: tuple[str, ...]
    shared: int = 0  # bytes of dynamic shared memory


def of_matrices(matrices: Sequence[QMatrix], width: int) -> Build:
    """For these matrices and a panel of this width."""
    return of_few(matrices, width) if width > 1 else of_pairs(matrices, 1)


def of_few(matrices: Sequence[QMatrix], width: int) -> Build:
    """For a panel of this width, 8 of whose columns are a product."""
    ragged = ["-DRAGGED"] * _ragged(matrices, _BLOCKS)
    return Build((formats("FEW_FORMATS", matrices), f"-DN={width}", *ragged))


def of_pairs(matrices: Sequence[QMatrix], width: int) -> Build:
    """For the tokens of a panel one by one."""
    wider = [int(all(m.cols % cols == 0 for m in matrices)) for cols in (64, 128)]
    blocks = _BLOCKS | {"MXFP4": 128 << wider[0], "A6": 128 << wider[0], "A2": 256 << wider[1]}
    most = -(-max(m.cols for m in matrices) // 512) * 512
    if width == 1:
        most = max(most, _USUAL)
    pairs = min(width, TILE)
    while pairs > 2 and pairs * 2 * most > _ROOM:
        pairs //= 2
    shared = 16 * 72 + pairs * (16 * (most // 8 + 4) + 4 * most // 32)  # Staged
    given = [f"-DPAIRS={pairs}", f"-DMOST={most}", f"-DSHARED={shared}"]
    given += [f"-DWIDER4={wider[0]}", f"-DWIDER2={wider[1]}"]
    given += ["-DRAGGED"] * _ragged(matrices, blocks)
    return Build((formats("FORMATS", matrices), *given), shared)


def of_experts(chosen: Sequence[QMatrix], shared: Sequence[QMatrix], width: int) -> Build:
    """For matrices of chosen experts, whose tokens go one by one, and of the shared one."""
    if width == 1 or not shared:
        return of_pairs((*chosen, *shared), width)
    pairs, few = of_pairs(chosen, width), of_few(shared, width)
    room = max(pairs.shared, _FEW_ROOM)
    options = [o for o in pairs.options if not o.startswith("-DSHARED=")]
    return Build((*dict.fromkeys((*options, *few.options)), f"-DSHARED={room}"), room)


def formats(macro: str, matrices: Sequence[QMatrix]) -> str:
    """What the compiler is told of the formats that a launch may meet."""
    names = sorted({format_name(m) for m in matrices})
    return f"-D{macro}(X)={''.join(f'X({name})' for name in names)}"


def _ragged(matrices: Sequence[QMatrix], blocks: dict[str, int]) -> bool:
    """Whether some rows are no whole blocks."""
    return any(m.cols % blocks[format_name(m).partition("+")[0]] for m in matrices)
