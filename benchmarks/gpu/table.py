"""The page docs/gpu-gate.md, and whether the one in the repository still holds."""

import json
from collections.abc import Sequence
from pathlib import Path

from benchmarks.gpu.markdown import row
from benchmarks.gpu.report import CaseReport, KernelReport, from_json

HEAD = """# What the GPU kernels compile to

Made by `make gpu-gate GATE_ARGS=--write` on a machine without a GPU; `make gpu-gate` compiles again
and fails when this page no longer holds; CI judges pages of 64 tokens and heads of 128 anew.
**Nothing here was timed.** Every case is compiled for the GPU it names, assembled and taken apart;
attention in every size that there are settings for, with few queries, with many, and with a chunk
of a prompt:

- *registers*, *spilled*, *stack*, *shared*: of a thread, bytes of a thread, bytes of a block.
- *occupancy*: the share of a core's threads that can live at a time, at most.
- *loads*: load instructions by width in bits; *bulk* ones are asynchronous copies.
- *tensor*: tensor-core instructions.
- *temporary*: bytes of the program besides arguments and results.
- *bytes*: that the program moves over those that any implementation has to move. It sees copies,
  conversions and padding around a kernel; a kernel itself is taken to read each array once, and
  whether it reads something again inside is not seen.
- *ceiling*: how many times over the instructions of a loop fit in the time that its bytes need,
  for each loop that loads. An upper bound, as if no instruction ever waited: below 1 the loop
  cannot reach the memory's bandwidth, above 1 it may. Of bulk copies the bytes are not known.
"""
COLUMNS = (
    "case|warps|registers|spilled|stack|shared|occupancy|loads|tensor|temporary|bytes|ceiling"
).split("|")
# What a new release of the compiler may change before the page must be made again.
TOLERANCE = 0.1


def gate_page(reports: Sequence[CaseReport]) -> str:
    """Markdown, a table per architecture."""
    lines = [HEAD]
    for architecture in dict.fromkeys(report.architecture for report in reports):
        lines += [f"\n## {architecture}\n", row(COLUMNS), row(["---"] * len(COLUMNS))]
        refused = []
        for report in reports:
            if report.architecture != architecture:
                continue
            if report.refusal:
                refused.append(f"- `{report.case}`: {report.refusal}")
            lines += [row(_cells(report, kernel)) for kernel in report.kernels]
        if refused:
            lines += ["\nRefused:\n", *refused]
    return "\n".join(lines) + "\n"


def _cells(report: CaseReport, kernel: KernelReport) -> list[str]:
    several = len(report.kernels) > 1
    loads = ", ".join(f"{n} × {bits}" for bits, n in kernel.load_bits.items())
    return [
        f"`{report.case}`" + (f" {kernel.name}" if several else ""),
        str(kernel.warps),
        str(kernel.registers),
        str(kernel.spilled_bytes),
        str(kernel.stack_bytes),
        f"{kernel.shared_bytes:,}",
        f"{kernel.occupancy:.0%}",
        loads,
        str(kernel.tensor_core_instructions),
        f"{report.temporary_bytes:,}",
        f"{report.bytes_over_floor:.3f}",
        ", ".join(f"{x:.2f}" for x in kernel.issue_ceilings) or "–",
    ]


def merged(reports: Sequence[CaseReport], file: Path) -> list[CaseReport]:
    """The reports of a file, with these in place of those of the same case and architecture."""
    old = list(map(from_json, json.loads(file.read_text()))) if file.is_file() else []
    found = {_key(x): x for x in (*old, *reports)}
    return sorted(found.values(), key=lambda x: (int(x.architecture[3:]), x.case))


def stale(reports: Sequence[CaseReport], file: Path) -> list[str]:
    """How what was found differs from what is in the repository.

    Cases, refusals and faults must agree, and numbers to a tenth: releases of the compiler differ
    in a few registers.
    """
    if not file.is_file():
        return [f"{file.name}: expected it in docs/, got none (make gpu-gate GATE_ARGS=--write)"]
    old = {_key(x): x for x in map(from_json, json.loads(file.read_text()))}
    new = {_key(x): x for x in reports}
    found = [f"{key}: not in {file.name}" for key in new if key not in old]
    found += [f"{key}: only in {file.name}" for key in old if key not in new]
    for key in new.keys() & old.keys():
        difference = _difference(old[key], new[key])
        if difference:
            found.append(f"{key}: {difference} (make gpu-gate GATE_ARGS=--write)")
    return sorted(found)


def _key(report: CaseReport) -> str:
    return f"{report.case} on {report.architecture}"


def _difference(old: CaseReport, new: CaseReport) -> str | None:
    if (old.refusal is None) != (new.refusal is None):
        return f"refusal: expected {old.refusal}, got {new.refusal}"
    if [k.name for k in old.kernels] != [k.name for k in new.kernels]:
        return "other kernels than in the table"
    pairs = [("bytes_over_floor", old.bytes_over_floor, new.bytes_over_floor)]
    for was, now in zip(old.kernels, new.kernels, strict=True):
        for field in ("registers", "shared_bytes", "warps", "tensor_core_instructions"):
            pairs.append((field, getattr(was, field), getattr(now, field)))
    for field, was, now in pairs:
        if abs(now - was) > TOLERANCE * max(was, 1):
            return f"{field}: expected {was}, got {now}"
    return None
