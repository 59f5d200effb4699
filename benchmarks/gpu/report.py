"""What the gate knows of a case on a target, and its judgement."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.gpu.sass import LOAD_BYTES, Code
from benchmarks.gpu.target import Target
from kvcompress_jax.kernels.case import MOST_BYTES

NARROW_SHARE = 0.5  # of what one pass through the code loads, by loads of less than 64 bits
BLOCKS = 32  # of a core, on every target


@dataclasses.dataclass(frozen=True, kw_only=True)
class KernelReport:
    """A kernel that was compiled and assembled."""

    name: str
    registers: int
    spilled_bytes: int
    stack_bytes: int
    shared_bytes: int
    warps: int
    occupancy: float  # share of a core's threads that can live at a time, at most
    load_bits: Mapping[str, int]  # load instructions of each width; "bulk": copied asynchronously
    tensor_core_instructions: int
    local_instructions: int
    issue_ceilings: Sequence[float]  # of the loops that load, see `Loop.issue_ceiling`

    @property
    def narrow(self) -> bool:
        """Whether most of what it loads comes in pieces of less than 64 bits."""
        if self.load_bits.get("bulk"):
            return False
        loaded = {int(bits): n * int(bits) for bits, n in self.load_bits.items()}
        small = sum(size for bits, size in loaded.items() if bits < 64)
        return small > NARROW_SHARE * sum(loaded.values()) or not loaded


@dataclasses.dataclass(frozen=True, kw_only=True)
class CaseReport:
    """A case on a target. Refused: `refusal` says why, and the rest is empty."""

    case: str
    op: str
    architecture: str
    needs_tensor_cores: bool
    refusal: str | None = None
    kernels: Sequence[KernelReport] = ()
    temporary_bytes: int = 0
    moved_bytes: int = 0
    floor_bytes: int = 1
    most_bytes: float = MOST_BYTES
    most_spilled: int = 0

    @property
    def bytes_over_floor(self) -> float:
        return self.moved_bytes / self.floor_bytes


def kernel_report(
    name: str, code: Code, target: Target, *, shared_bytes: int, warps: int
) -> KernelReport:
    """Joins what the assembler, the disassembler and the launch say of a kernel."""
    widths = {
        str(8 * size): code.mix[kind] for kind, size in LOAD_BYTES.items() if kind in code.mix
    }
    if bulk := code.mix.get("bulk load"):
        widths["bulk"] = bulk
    ceilings = (loop.issue_ceiling(target.bytes_per_cycle) for loop in code.loops)
    shared = max(shared_bytes, code.static_shared_bytes)
    return KernelReport(
        name=name,
        registers=code.registers,
        spilled_bytes=code.spilled_bytes,
        stack_bytes=code.stack_bytes,
        shared_bytes=shared,
        warps=warps,
        occupancy=_occupancy(target, code.registers, shared, warps),
        load_bits=widths,
        tensor_core_instructions=code.mix.get("tensor core", 0),
        local_instructions=code.mix.get("local memory", 0),
        issue_ceilings=[round(x, 3) for x in ceilings if x is not None],
    )


def _occupancy(target: Target, registers: int, shared_bytes: int, warps: int) -> float:
    """Registers are handed out to warps in units of 256, shared memory by the kilobyte, and one
    kilobyte of each block is the system's."""
    per_warp = -(-registers * 32 // 256) * 256
    fits = [BLOCKS, target.threads // (32 * warps), target.registers // (per_warp * warps)]
    fits.append(target.shared_bytes // (-(-shared_bytes // 1024) * 1024 + 1024))
    return round(min(fits) * warps * 32 / target.threads, 3)


def faults(report: CaseReport) -> list[str]:
    """Why a case fails the gate; empty: it does not. A refusal is no fault here: see `judge`."""
    found = []
    if report.refusal is None and not report.kernels:
        found.append("no kernel in the program")
    for kernel in report.kernels:
        known = report.most_spilled
        if kernel.spilled_bytes > known or (kernel.local_instructions and not known):
            found.append(
                f"{kernel.name}: {kernel.spilled_bytes} bytes spilled,"
                f" {kernel.local_instructions} instructions on local memory"
            )
        if kernel.narrow:
            found.append(f"{kernel.name}: narrow loads, {dict(kernel.load_bits)}")
    tensor = any(kernel.tensor_core_instructions for kernel in report.kernels)
    if report.kernels and report.needs_tensor_cores and not tensor:
        found.append("no tensor-core instruction")
    if report.refusal is None and report.bytes_over_floor > report.most_bytes:
        over = report.bytes_over_floor
        found.append(f"{over:.3f} of the floor in bytes, over {report.most_bytes}")
    return found


def judge(reports: Sequence[CaseReport], allowed: Mapping[str, str]) -> list[str]:
    """All that is wrong, one line each.

    Args:
      reports: of all cases on all targets.
      allowed: "case on architecture" (or "case") of refusals that are known, and words that their
        reason has; another refusal is a fault, and so is one that is no longer there.
    """
    found = []
    refused = set()
    for report in reports:
        where = f"{report.case} on {report.architecture}"
        found += [f"{where}: {fault}" for fault in faults(report)]
        if report.refusal is not None:
            key = where if where in allowed else report.case
            if key in allowed and allowed[key] in report.refusal:
                refused.add(key)
            else:
                found.append(f"{where}: refused: {report.refusal}")
    gone = [key for key in allowed if key not in refused]
    found += [f"{key}: expected to be refused ({allowed[key]}), got compiled" for key in gone]
    if not reports:
        found.append("no case was compiled")
    return found


def as_json(report: CaseReport) -> dict[str, Any]:
    """For the file in the repository."""
    return dataclasses.asdict(report) | {"bytes_over_floor": round(report.bytes_over_floor, 4)}


def from_json(fields: Mapping[str, Any]) -> CaseReport:
    """The inverse of `as_json`."""
    plain = {k: v for k, v in fields.items() if k != "bytes_over_floor"}
    kernels = [KernelReport(**kernel) for kernel in plain.pop("kernels")]
    return CaseReport(**plain, kernels=kernels)
