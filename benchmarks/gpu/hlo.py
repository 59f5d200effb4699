"""Bytes that a compiled program moves to and from the device's memory, read off its HLO text.

XLA's own cost analysis says nothing of programs compiled for a device that is not there. Every
operation reads its operands, each array once, and writes its result; what a fusion slices or
gathers from is read in the slice's size, what is updated in place is written in the update's size,
and a loop counts as often as it runs. A kernel (custom call) is taken to read each of its arrays
once, but for those that its results take the place of: for a case that names every page once, that
is what it must read. What it reads again inside is not seen from here.
"""

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence

BYTES = {"f64": 8, "s64": 8, "u64": 8, "f32": 4, "s32": 4, "u32": 4, "bf16": 2, "f16": 2}
BYTES |= {"s16": 2, "u16": 2, "s8": 1, "u8": 1, "pred": 1, "f8e4m3fn": 1, "f8e5m2": 1}
FREE = ("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "iota")
SLICES = ("dynamic-slice", "gather", "slice")
TRIVIAL = ("bitcast", "reshape")


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of HLO."""

    name: str
    type: str
    opcode: str
    operands: Sequence[str]
    attributes: str
    root: bool

    @property
    def bytes(self) -> int:
        """Of the result; all elements of a tuple."""
        return type_bytes(self.type)


Computation = Mapping[str, Instruction]


def type_bytes(text: str) -> int:
    """Of a type, "bf16[8,128]{1,0}" or a tuple of types."""
    found = re.findall(r"\b([a-z]+[0-9a-z]*)\[([0-9,]*)\]", text)
    return sum(
        BYTES[dtype] * math.prod(int(n) for n in shape.split(",") if n)
        for dtype, shape in found
        if dtype in BYTES
    )


def moved_bytes(text: str, *, trips: int = 1) -> int:
    """Bytes that the program moves.

    Args:
      text: of a compiled module.
      trips: how often a loop runs whose text does not say.
    """
    computations, entry = _parse(text)
    return _computation_bytes(computations[entry], computations, trips)


def _parse(text: str) -> tuple[dict[str, Computation], str]:
    computations: dict[str, dict[str, Instruction]] = {}
    entry, current = "", None
    for line in text.splitlines():
        if head := re.match(r"(ENTRY )?%?([\w.\-]+) .*\{$", line):
            current = computations.setdefault(head[2], {})
            entry = head[2] if head[1] else entry
        elif current is not None and (found := re.match(r"\s+(ROOT )?%([\w.\-]+) = (.*)", line)):
            instruction = _instruction(found[2], found[3], root=bool(found[1]))
            current[instruction.name] = instruction
    return dict(computations), entry


def _instruction(name: str, rest: str, *, root: bool) -> Instruction:
    end = _closing(rest, 0) + 1 if rest.startswith("(") else rest.index(" ")
    kind, rest = rest[:end], rest[end:].strip()
    start = rest.index("(")
    stop = _closing(rest, start)
    operands = re.findall(r"%([\w.\-]+)", rest[start : stop + 1])
    return Instruction(name, kind, rest[:start], operands, rest[stop + 1 :], root)


def _closing(text: str, start: int) -> int:
    """Where the bracket that opens at `start` closes."""
    depth = 0
    for i in range(start, len(text)):
        depth += {"(": 1, ")": -1}.get(text[i], 0)
        if depth == 0:
            return i
    raise ValueError(f"HLO: expected a closing bracket in {text[:80]!r}, got none")


def _computation_bytes(
    computation: Computation, computations: Mapping[str, Computation], trips: int
) -> int:
    return sum(_moved(x, computation, computations, trips) for x in computation.values())


def _moved(
    x: Instruction, around: Computation, computations: Mapping[str, Computation], trips: int
) -> int:
    if x.opcode in FREE or x.opcode.endswith("-done"):
        return 0
    called = re.findall(r"(?:calls|body|to_apply)=%([\w.\-]+)", x.attributes)
    if x.opcode == "while":
        known = re.search(r'"known_trip_count":\{"n":"(\d+)"', x.attributes)
        runs = int(known[1]) if known else trips
        return runs * _computation_bytes(computations[called[0]], computations, trips)
    if x.opcode == "call":
        return _computation_bytes(computations[called[0]], computations, trips)
    if x.opcode == "conditional":
        branches = re.findall(r"%([\w.\-]+)", x.attributes.split("branch_computations")[-1])
        branches += re.findall(r"(?:true|false)_computation=%([\w.\-]+)", x.attributes)
        bodies = [computations[b] for b in branches if b in computations]
        return max(_computation_bytes(body, computations, trips) for body in bodies)
    if x.opcode == "fusion":
        return _fusion_bytes(x, around, computations[called[0]])
    if x.opcode in SLICES:
        return 2 * x.bytes
    if x.opcode == "dynamic-update-slice":
        return 2 * around[x.operands[1]].bytes
    operands = list(x.operands)
    aliased = re.search(r"output_to_operand_aliasing=\{(.*?)\}(?:, [a-z]|$)", x.attributes)
    if aliased:
        taken = {int(n) for n in re.findall(r"\((\d+), \{", aliased[0])}
        operands = [name for i, name in enumerate(operands) if i not in taken]
    sources = {_source(name, around) for name in operands if name in around}
    return x.bytes + sum(around[name].bytes for name in sources)


def _source(name: str, around: Computation) -> str:
    """The value that a chain of operations only renames: two views of a pool are one array."""
    while around[name].opcode in TRIVIAL and around[name].operands[0] in around:
        name = around[name].operands[0]
    return name


def _fusion_bytes(x: Instruction, around: Computation, fused: Computation) -> int:
    total = 0
    for inner in fused.values():
        if inner.opcode == "parameter":
            users = _users(inner.name, fused)
            if users and all(_sliced(name, user) for name, user in users):
                total += sum(user.bytes for _, user in users if user.opcode in SLICES)
            else:
                total += inner.bytes
    root = next(i for i in fused.values() if i.root)
    results = [fused[name] for name in root.operands] if root.opcode == "tuple" else [root]
    for result in results:
        while result.opcode in TRIVIAL:
            result = fused[result.operands[0]]
        update = result.opcode == "dynamic-update-slice"
        total += fused[result.operands[1]].bytes if update else result.bytes
    return total


def _users(name: str, fused: Computation) -> list[tuple[str, Instruction]]:
    """Who uses a value, seen through operations that only rename it, and under which name."""
    found = []
    for user in fused.values():
        if name in user.operands:
            through = user.opcode in TRIVIAL and not user.root
            found += _users(user.name, fused) if through else [(name, user)]
    return found


def _sliced(name: str, user: Instruction) -> bool:
    """Whether `user` takes only a slice of the value, or updates it in place."""
    first = user.operands[0] == name and name not in user.operands[1:]
    return first and (user.opcode in SLICES or user.opcode == "dynamic-update-slice")
