"""FP4 keys decoded by a GPU's own instructions."""

from typing import Any

import numpy as np
import pytest

from ds4.quant import formats

pytest.importorskip("triton")

from ds4.backends.cuda.kernels import index_score


def test_inline_assembly_decodes_fp4() -> None:
    """Its few instructions, carried out in NumPy for every byte and some powers."""
    byte = np.arange(256, dtype=np.uint32)
    for e in (0, -1, -7, -23):
        power = int(np.float16(2.0 ** (e + 14)).view(np.uint16))
        pair = np.full(64, power * 65537, np.uint32)
        registers = {"$4": byte[::4] | byte[1::4] << 8 | byte[2::4] << 16 | byte[3::4] << 24}
        registers |= {"$5": pair, "$6": pair}
        for line in index_score.DECODE.value.strip("{} \n").split(";")[:-1]:
            op, *names = line.replace(",", " ").split()
            if op != ".reg":
                registers[names[0]] = carry_out(op, [operand(registers, x) for x in names[1:]])
        for nibble, (first, second) in ((byte & 15, ("$0", "$1")), (byte >> 4, ("$2", "$3"))):
            halves = np.stack([registers[first], registers[second]], -1).view(np.float16)
            want = np.ldexp(formats.E2M1[nibble], e)
            np.testing.assert_array_equal(halves.reshape(-1).astype(np.float32), want)


def operand(registers: dict[str, np.ndarray], name: str) -> Any:
    return registers[name] if name in registers else np.uint32(int(name, 0))


def carry_out(op: str, x: list[Any]) -> np.ndarray:
    if op == "prmt.b32":  # each nibble of the last operand chooses a byte of the first two
        sources = [x[i] >> np.uint32(8 * j) & 255 for i in (0, 1) for j in range(4)]
        chosen = [sources[int(x[2]) >> 4 * i & 7] << np.uint32(8 * i) for i in range(4)]
        return np.bitwise_or.reduce(np.broadcast_arrays(*chosen)).astype(np.uint32)
    if op == "lop3.b32":
        assert x[3] == 0xEA  # of the table: (a & b) | c
        return x[0] & x[1] | x[2]
    if op == "mul.f16x2":
        return (x[0].view(np.float16) * x[1].view(np.float16)).view(np.uint32)
    return {"shl.b32": np.left_shift, "and.b32": np.bitwise_and}[op](*x)
