"""Compiles cases for one target and looks at what came out."""

import os
import re
import shutil
import tempfile
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

from benchmarks.gpu.ahead import compile_for
from benchmarks.gpu.hlo import moved_bytes
from benchmarks.gpu.report import CaseReport, KernelReport, kernel_report
from benchmarks.gpu.sass import assemble
from benchmarks.gpu.target import Target
from kvcompress_jax.kernels.case import Case


def inspect_cases(
    cases: Sequence[Case], target: Target, *, done: Callable[[CaseReport], None]
) -> None:
    """Reports on each case. To be called once in a process, before JAX compiles anything: where
    XLA leaves its files is decided then."""
    folder = Path(tempfile.mkdtemp(prefix="gpu-gate-"))
    kernels = folder / "mosaic"
    kernels.mkdir()
    os.environ["MOSAIC_GPU_DUMP_TO"] = str(kernels)
    flags = [os.environ.get("XLA_FLAGS", ""), f"--xla_dump_to={folder}"]
    os.environ["XLA_FLAGS"] = " ".join([*flags, "--xla_dump_emitter_re=ptx"])
    warnings.simplefilter("ignore", DeprecationWarning)
    try:
        for case in cases:
            done(_inspect(case, target, folder))
            for file in folder.rglob("*.*"):
                file.unlink()
    finally:
        shutil.rmtree(folder)


def _inspect(case: Case, target: Target, folder: Path) -> CaseReport:
    named = {
        "case": case.name,
        "op": case.op,
        "architecture": target.architecture,
        "needs_tensor_cores": case.needs_tensor_cores,
    }
    try:
        function, arguments = case.build()
        compiled = compile_for(function, arguments, target, donate=case.donate)
    except Exception as e:  # whatever a compiler says is a refusal; the judge knows which are known
        reason = " ".join(str(e).split())[:300]
        return CaseReport(**named, refusal=f"{type(e).__name__}: {reason}")
    text = compiled.as_text()
    memory = compiled.memory_analysis()
    return CaseReport(
        **named,
        kernels=_kernels(text, target, folder),
        temporary_bytes=memory.temp_size_in_bytes,
        moved_bytes=moved_bytes(text),
        floor_bytes=case.floor_bytes,
        most_bytes=case.most_bytes,
        most_spilled=case.most_spilled,
    )


def _kernels(text: str, target: Target, folder: Path) -> list[KernelReport]:
    """Of the program's own kernels, not of those that XLA made of plain operations."""
    ours = set(re.findall(r'op_name="[^"]*?(\w+)/pallas_call"', text))
    (thunks,) = folder.glob("*thunk_sequence.txt")
    launches = re.findall(
        r"\] (\w+) grid: .*? threads: \[(\d+), .*?shared_memory: (\d+)", thunks.read_text()
    )
    launched = {name: (int(threads), int(shared)) for name, threads, shared in launches}
    reports = []
    for ptx in sorted(folder.glob("*.ptx")):
        entry = re.search(r"\.entry (\w+)\(", ptx.read_text())
        if entry and entry[1] in launched and any(entry[1].startswith(name) for name in ours):
            threads, shared = launched[entry[1]]
            code = assemble(ptx, target.assembler_architecture)
            reports.append(
                kernel_report(entry[1], code, target, shared_bytes=shared, warps=threads // 32)
            )
    return reports + [_mosaic_kernel(x, target) for x in sorted(folder.glob("mosaic/*.ptx"))]


def _mosaic_kernel(ptx: Path, target: Target) -> KernelReport:
    """Mosaic GPU assembles its kernels itself, and says of the launch in a dump of its own."""
    text = ptx.read_text()
    entry, threads = re.search(r"\.entry (\w+)\(", text), re.search(r"\.maxntid (\d+)", text)
    launch = ptx.with_name(f"{ptx.stem}.after_layout_inference.txt").read_text()
    shared = re.search(r"dynamic_shared_memory_size %c(\d+)_i32", launch)
    if entry is None or threads is None or shared is None:
        raise ValueError(f"{ptx.name}: expected a kernel, its threads and shared memory, got none")
    return kernel_report(
        entry[1].removesuffix("_mosaic_gpu_kernel"),
        assemble(ptx, target.assembler_architecture),
        target,
        shared_bytes=int(shared[1]),
        warps=int(threads[1]) // 32,
    )
