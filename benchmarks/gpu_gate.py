"""The gate of the GPU kernels, on a machine without a GPU.

    make gpu-gate                               # compiles, judges, compares with the repository
    make gpu-gate GATE_ARGS=--write             # ... and writes docs/gpu-gate.md and .json
    make gpu-gate GATE_ARGS="--only seal_page"  # some of the cases, compared with nothing; with
                                                # --write they replace themselves in the table

Compiles every op for every case for sm_80, sm_90 and sm_100, assembles it, and tabulates what the
hardware would get. Exits 1 on a spill, narrow loads, a missing tensor-core instruction, more bytes
than 1.05 of the floor (or than the case may move), an unknown refusal, or when the table in the
repository is another one.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.gpu.cases import REFUSALS, gate_cases, refusals_of
from benchmarks.gpu.inspect import inspect_cases
from benchmarks.gpu.report import CaseReport, as_json, from_json, judge
from benchmarks.gpu.table import gate_page, merged, stale
from benchmarks.gpu.target import load_target

TARGETS = ("a100", "h100", "b200")
DOCS = Path(__file__).parents[1] / "docs"
SECONDS = 1800  # that one target may take


def main() -> int:
    """Runs a process per target; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", metavar="TEXT", help="cases with it in their name")
    parser.add_argument("--targets", nargs="+", choices=TARGETS, default=TARGETS)
    parser.add_argument("--write", action="store_true", help="the table in docs/")
    parser.add_argument("--worker", metavar="FILE", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        return _work(args.only, args.targets[0], args.worker)
    start = time.monotonic()
    reports: list[CaseReport] = []
    found: list[str] = []
    for target in args.targets:
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "reports.json"
            command = [sys.executable, "-m", "benchmarks.gpu_gate", "--worker", str(file)]
            command += ["--targets", target, "--only", args.only]
            ended = subprocess.run(command, timeout=SECONDS)
            if file.exists():
                reports += [from_json(x) for x in json.loads(file.read_text())]
            if ended.returncode:  # a compiler that fails may take the process with it
                found.append(f"{target}: the process ended with {ended.returncode}")
    partial = bool(args.only) or tuple(args.targets) != TARGETS
    seen = refusals_of([(x.case, x.architecture) for x in reports])
    found += judge(reports, seen if partial else REFUSALS)
    file = DOCS / "gpu-gate.json"
    if args.write:
        written = merged(reports, file) if partial else reports
        DOCS.mkdir(exist_ok=True)
        file.write_text(json.dumps([as_json(x) for x in written], indent=1) + "\n")
        file.with_suffix(".md").write_text(gate_page(written))
    elif not partial:
        found += stale(reports, file)
    for line in found:
        print(f"FAULT {line}")
    verdict = "fails" if found else "passes"
    print(f"gpu-gate {verdict}: {len(reports)} compiles, {time.monotonic() - start:.0f} s")
    return 1 if found else 0


def _work(only: str, name: str, file: Path) -> int:
    target = load_target(name)
    reports: list[CaseReport] = []

    def done(report: CaseReport) -> None:
        reports.append(report)
        file.write_text(json.dumps([as_json(x) for x in reports]))
        print(one_line(report), flush=True)

    inspect_cases([case for case in gate_cases() if only in case.name], target, done=done)
    return 0


def one_line(report: CaseReport) -> str:
    """For the terminal."""
    line = f"{report.architecture} {report.case}: "
    if report.refusal:
        return line + report.refusal
    kernels = (
        f"{k.name} {k.registers} registers, {k.spilled_bytes} spilled, {k.shared_bytes} shared,"
        f" {dict(k.load_bits)} loads, {k.tensor_core_instructions} tensor,"
        f" ceilings {list(k.issue_ceilings)}"
        for k in report.kernels
    )
    return f"{line}{report.bytes_over_floor:.3f} of the floor; {'; '.join(kernels)}"


if __name__ == "__main__":
    sys.exit(main())
