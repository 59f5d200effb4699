"""From PTX to what the hardware gets: resources, instructions, loops."""

import collections
import dataclasses
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

# First match counts. Tensor-core instructions of all generations, then memory, then the rest.
KINDS = (
    ("tensor core", r"(HMMA|IMMA|QMMA|HGMMA|IGMMA|QGMMA|UTC\w*MMA)"),
    ("bulk load", r"(UTMALDG|UBLKCP)"),
    ("load 128", r"(LDG|LDGSTS)\.\S*128"),
    ("load 64", r"(LDG|LDGSTS)\.\S*64"),
    ("load 16", r"LDG\.\S*[US]16"),
    ("load 8", r"LDG\.\S*[US]8"),
    ("load 32", r"(LDG|LDGSTS)\b"),
    ("store 128", r"STG\.\S*128"),
    ("store 64", r"STG\.\S*64"),
    ("store 16", r"STG\.\S*U?16"),
    ("store 8", r"STG\.\S*[US]8"),
    ("store 32", r"STG\b"),
    ("local memory", r"(LDL|STL)\b"),
    ("shared memory", r"(LDS|STS|LDSM|STSM)\b"),
    ("shuffle", r"SHFL\b"),
    ("barrier", r"(BAR|SYNCS|WARPSYNC|DEPBAR|LDGDEPBAR)\b"),
    ("convert", r"(I2F|F2I|F2F|I2FP|F2FP)\b"),
)
LOAD_BYTES = {"load 128": 16, "load 64": 8, "load 32": 4, "load 16": 2, "load 8": 1}
LANES = 32
SCHEDULERS = 4  # of a core; each issues one instruction of one warp per cycle


class ToolError(Exception):
    """The assembler or disassembler is missing or refused its input."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Loop:
    """An innermost loop: instructions of one pass of one warp."""

    instructions: int
    mix: Mapping[str, int]

    @property
    def loaded_bytes(self) -> int:
        """That one warp loads in one pass by loads of 64 bits and more; scalars and scales, which
        lanes share, are left out."""
        wide = (kind for kind in ("load 128", "load 64") if kind in self.mix)
        return sum(LANES * LOAD_BYTES[kind] * self.mix[kind] for kind in wide)

    def issue_ceiling(self, bytes_per_cycle: float) -> float | None:
        """How many times over the loop's instructions fit in the time that its bytes need.

        An upper bound: instructions are taken to issue without ever waiting. Below 1, the loop
        cannot reach the memory's bandwidth. None for a loop that loads nothing itself.
        """
        if not self.loaded_bytes:
            return None
        return self.loaded_bytes / bytes_per_cycle / (self.instructions / SCHEDULERS)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Code:
    """An assembled kernel."""

    registers: int
    stack_bytes: int
    spilled_bytes: int  # stores and loads of them
    static_shared_bytes: int
    instructions: int
    mix: Mapping[str, int]
    loops: Sequence[Loop]  # innermost, in the order of the code


def assemble(ptx: Path, architecture: str) -> Code:
    """Assembles a file of PTX with one kernel, and takes it apart again."""
    cubin = ptx.with_suffix(".cubin")
    log = _run("ptxas", "-v", "-O3", f"-arch={architecture}", str(ptx), "-o", str(cubin))
    listing = _run("nvdisasm", "-c", str(cubin))
    instructions, labels = _parse(listing)
    spilled = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", log)
    return Code(
        registers=_number(r"Used (\d+) registers", log),
        stack_bytes=_number(r"(\d+) bytes stack frame", log),
        spilled_bytes=sum(int(x) for x in spilled.groups()) if spilled else 0,
        static_shared_bytes=_number(r"(\d+) bytes smem", log),
        instructions=len(instructions),
        mix=count_kinds(instructions),
        loops=[
            Loop(instructions=end - start, mix=count_kinds(instructions[start:end]))
            for start, end in _innermost(instructions, labels)
        ],
    )


def count_kinds(instructions: Sequence[str]) -> dict[str, int]:
    """Instructions ("HMMA.16816.F32 R4, ...") of each of `KINDS` that occurs."""
    counts = collections.Counter(
        next((kind for kind, pattern in KINDS if re.match(pattern, x)), "other")
        for x in instructions
    )
    return {kind: counts[kind] for kind in (*(k for k, _ in KINDS), "other") if counts[kind]}


def _run(tool: str, *arguments: str) -> str:
    path = next(Path(sys.prefix).glob(f"lib/python3*/site-packages/nvidia/cu*/bin/{tool}"), None)
    if path is None:
        raise ToolError(f"{tool}: expected it in this environment (make gpu-gate), got none")
    done = subprocess.run([path, *arguments], capture_output=True, text=True, timeout=300)
    if done.returncode:
        raise ToolError(f"{tool}: {(done.stderr + done.stdout).strip()[:500]}")
    return done.stdout + done.stderr


def _number(pattern: str, log: str) -> int:
    found = re.search(pattern, log)
    return int(found[1]) if found else 0


def _parse(listing: str) -> tuple[list[str], dict[str, int]]:
    """Instructions without their predicates, and the number of the one after each label."""
    instructions: list[str] = []
    labels: dict[str, int] = {}
    for line in listing.splitlines():
        if label := re.match(r"\s*(\.L_x_\d+):", line):
            labels[label[1]] = len(instructions)
        elif found := re.search(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][^;]*);", line):
            instructions.append(found[1].strip())
    return instructions, labels


def _innermost(instructions: Sequence[str], labels: Mapping[str, int]) -> list[tuple[int, int]]:
    """[start, end) of loops that hold no other; a loop is a branch backwards."""
    loops = []
    for i, text in enumerate(instructions):
        target = re.search(r"`\((\.L_x_\d+)\)", text) if text.startswith("BRA") else None
        if target and labels.get(target[1], i) < i - 4:  # the end of a kernel branches to itself
            loops.append((labels[target[1]], i + 1))
    return [x for x in loops if not any(y != x and y[0] >= x[0] and y[1] <= x[1] for y in loops)]
