"""Reads machine code: what a GPU would have to be lucky about."""

import re

_INSTRUCTION = re.compile(r"\s*/\*[0-9a-f]{4,5}\*/\s+(?:@!?U?P\w+ )?([A-Z0-9_.]+)\s*(.*?);")
_LABEL = re.compile(r"\s*(\.L_x_\d+):")
_WRITES_NO_REGISTER = "ST", "BRA", "LDGSTS", "BAR", "ISETP", "CCTL", "RED", "R2UR"
_WIDTH = {"LDS.128": 4, "LDS.64": 2, "LDG.E.128": 4, "LDG.E.64": 2}


def overwritten_operands(sass: str, function: str) -> list[str]:
    """Instructions in loops that write a register which a product under way (wgmma) still reads.

    The left operands of asynchronous products must stay as they are until the group is waited
    for, also when that happens in the next round of the loop. `sass` is nvdisasm's.
    """
    start = sass.index(f".text.{function}:")
    end = sass.find(".section", start)
    code: list[tuple[str, str]] = []
    labels: dict[str, int] = {}
    for line in sass[start : end if end > 0 else None].splitlines():
        if label := _LABEL.match(line):
            labels[label[1]] = len(code)
        elif instruction := _INSTRUCTION.match(line):
            code.append((instruction[1], instruction[2]))
    found = []
    for i, (name, operands) in enumerate(code):
        target = re.search(r"\.L_x_\d+", operands) if name.startswith("BRA") else None
        top = labels.get(target[0], i + 1) if target else i + 1
        if any(n.startswith("HGMMA") for n, _ in code[top : i + 1]):
            found += _in_loop(code[top : i + 1])
    return found


def _in_loop(loop: list[tuple[str, str]]) -> list[str]:
    groups: list[set[int]] = []
    open_group: set[int] = set()
    found = []
    for name, operands in loop * 2:  # the second round meets what the first left under way
        registers = [int(r) for r in re.findall(r"\bR(\d+)", operands)]
        if name.startswith("HGMMA"):
            open_group |= set(range(registers[1], registers[1] + 4))
            if "gsb0" in operands:
                groups.append(open_group)
                open_group = set()
        elif name.startswith("WARPGROUP.DEPBAR"):
            pending = int(operands.split(",")[1], 16)
            groups = groups[len(groups) - pending :] if pending else []
        elif registers and not name.startswith(_WRITES_NO_REGISTER):
            width = 2 if name.startswith("IMAD.WIDE") else _WIDTH.get(name, 1)
            written = set(range(registers[0], registers[0] + width))
            if written & open_group.union(*groups):
                found.append(f"{name} {operands}")
    return found


def awaited_at_once(sass: str) -> list[str]:
    """Between products (mma), what reads a register that was asked of memory just before.

    There loads are for the next round: whoever reads one before the next product waits for it
    while nothing is multiplied. `sass` is cuobjdump's, of one kernel.
    """
    code = [m.groups() for m in map(_INSTRUCTION.match, sass.splitlines()) if m]
    products = [i for i, (name, _) in enumerate(code) if name.startswith("HMMA")]
    asked: set[int] = set()
    found = []
    for name, operands in code[products[0] : products[-1]]:
        registers = [int(r) for r in re.findall(r"\bR(\d+)", operands)]
        if name.startswith("HMMA"):
            asked.clear()
        elif name.startswith(("LDG", "LD.E")):
            wide = 4 if ".128" in name else 2 if ".64" in name else 1
            asked |= set(range(registers[0], registers[0] + wide))
        elif asked & set(registers[0 if name.startswith("ST") else 1 :]):
            found.append(f"{name} {operands}")
        else:
            asked -= set(registers[:1])
    return found
