"""Uniform registers in the machine code of a kernel for compute capability 9.0 that are read though nothing wrote them.

The ptxas of CUDA 12.8 loses, in large kernels, the write of a matrix descriptor's lower half: the matrix unit then reads its
operand from anywhere in shared memory. A program shows it as a read of a register that some path has not written.
"""

from __future__ import annotations

import re
from typing import NamedTuple

_LINE = re.compile(r"/\*([0-9a-f]{4,5})\*/\s+(?:(@!?U?P\w+)\s+)?([A-Zx0-9_.]+)\s*(.*?)\s*;")
_WRITERS = ("R2UR", "S2UR", "VOTEU", "REDUX")
_COUNT = 63  # UR63 is zero


class Instruction(NamedTuple):
    """One line of a disassembly."""

    at: int
    predicate: str | None
    name: str
    operands: str


def parse(text: str) -> list[Instruction]:
    """The instructions of ``cuobjdump --dump-sass`` of one kernel."""
    found = (_LINE.search(line) for line in text.splitlines())
    return [Instruction(int(m[1], 16), m[2], m[3], m[4]) for m in found if m]


def unwritten(text: str) -> list[tuple[str, int]]:
    """(address and instruction, register) of each read of a uniform register that not every path to it has written."""
    program = parse(text)
    follow = _follow(program)
    before: list[frozenset[int] | None] = [None] * len(program)
    before[0] = frozenset()
    left = [0]
    while left:
        here = left.pop()
        now = (before[here] or frozenset()) | _writes(program[here])
        for then in follow[here]:
            known = before[then]
            merged = now if known is None else known & now
            if merged != known:
                before[then] = merged
                left.append(then)
    return [
        (f"{line.at:#x} {line.name} {line.operands}", register)
        for line, written in zip(program, before, strict=True)
        if written is not None
        for register in sorted(_reads(line) - written)
    ]


def _follow(program: list[Instruction]) -> list[list[int]]:
    """The places that may come after each instruction."""
    place = {line.at: number for number, line in enumerate(program)}
    found: list[list[int]] = []
    for number, line in enumerate(program):
        after = [number + 1] if number + 1 < len(program) else []
        kind = line.name.partition(".")[0]
        sometimes = line.predicate is not None or re.match(r"!?U?P\d", line.operands) is not None
        if kind == "BRA":
            target = re.search(r"0x([0-9a-f]+)", line.operands)
            to = [place[int(target[1], 16)]] if target and int(target[1], 16) in place else []
            found.append(to + (after if sometimes else []))
        elif kind in ("EXIT", "RET"):
            found.append(after if sometimes else [])
        else:
            found.append(after)
    return found


def _parts(line: Instruction) -> tuple[str, list[str]]:
    """(the operand that is written, those that are read)."""
    parts = [part.strip() for part in re.split(r",(?![^\[]*\])", line.operands)]
    kind = line.name.partition(".")[0]
    if (kind.startswith("U") or kind in _WRITERS) and re.fullmatch(r"UR\d+", parts[0]):
        return parts[0], parts[1:]
    return "", parts


def _writes(line: Instruction) -> frozenset[int]:
    target, _ = _parts(line)
    if not target:
        return frozenset()
    first = int(target[2:])
    wide = 4 if ".128" in line.name else 2 if ".64" in line.name or ".WIDE" in line.name else 1
    return frozenset(range(first, first + wide))


def _reads(line: Instruction) -> set[int]:
    if line.name.startswith("HGMMA"):
        # A descriptor's four registers: the first two are of the left operand, where that is not in registers itself.
        skipped = 2 if re.search(r"(^| )R\d+, R\d+, gdesc", line.operands) else 0
        return {int(at) + i for at in re.findall(r"gdesc\[UR(\d+)\]", line.operands) for i in range(skipped, 4)}
    return {int(n) for part in _parts(line)[1] for n in re.findall(r"\bUR(\d+)\b", part) if int(n) < _COUNT}
