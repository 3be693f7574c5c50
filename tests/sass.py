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
