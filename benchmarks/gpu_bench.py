"""Times the GPU kernels on the GPU at hand, after checking what they give.

    python -m benchmarks.gpu_bench [--quick] [--only ops] [--json FILE] [--markdown FILE]
    python -m benchmarks.gpu_bench --interpret    # on any device: checks small cases, times nothing

Tables: ops (time, share of the measured copy bandwidth at the bytes that the op has to move, ratio
to the XLA path) and decode attention (ratios to attention to an uncompressed cache, and to the XLA
path). Exits 1 when a result is wrong, which is not timed, and 2 without a GPU.
"""

import argparse
import platform
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
from rich.console import Console

from benchmarks.gpu.cases import all_cases
from benchmarks.gpu.decode_times import check_attention, time_attention
from benchmarks.gpu.times_page import print_tables, times_page
from kvcompress_jax.kernels.case import Case
from kvcompress_jax.kernels.decode_attention import cases as decode_cases
from kvcompress_jax.kernels.hadamard import cases as hadamard_cases
from kvcompress_jax.kernels.open_page import cases as open_cases
from kvcompress_jax.kernels.seal_page import cases as seal_cases
from kvcompress_jax.lab.case_timing import REPEATS, Measured, measure_cases
from kvcompress_jax.lab.device import DeviceError, require_gpu
from kvcompress_jax.lab.output import check_writable, replacing, write_json
from kvcompress_jax.lab.timing import median_seconds


def main() -> int:
    """Checks, times and prints; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="one shape and batch of attention")
    parser.add_argument("--only", choices=("ops", "attention"), help="one of the two tables")
    parser.add_argument("--interpret", action="store_true", help="check small cases on any device")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results there too")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="and the tables there")
    args = parser.parse_args()
    console = Console()
    if args.interpret:
        cases = [
            seal_cases.make_case(16, 64, 8, "bfloat16", True, pages=2, interpret=True),
            open_cases.make_case(16, 64, 8, "bfloat16", pages=2, interpret=True),
            hadamard_cases.make_case(64, "bfloat16", vectors=128, interpret=True),
            decode_cases.make_case(16, 64, 8, 2, "bfloat16", "mass", tokens=64, interpret=True),
        ]
        return 1 if any(x.wrong for x in check_cases(console, cases, timed=False)) else 0
    try:
        device = require_gpu("gpu_bench")
    except DeviceError as e:
        print(e, file=sys.stderr)
        return 2
    for file in (args.json, args.markdown):
        if file is not None:
            check_writable(file)
    cases = []
    if args.only != "attention":
        cases = [case for case in all_cases() if case.example and runs(console, case)]
    # The reference of attention is dense, and no way to do it; `time_attention` has XLA's.
    dense = [case for case in cases if case.op.endswith("_attention")]
    codec = [case for case in cases if case not in dense]
    measured = check_cases(console, codec, timed=True, references=True)
    measured += check_cases(console, dense, timed=True)
    wrong = any(x.wrong for x in measured)
    if args.only != "ops":
        wrong = check_attention(console) or wrong
    copied = copy_bandwidth()
    result = {
        "device": device,
        "host": platform.machine(),
        "jax": jax.__version__,
        "repeats": REPEATS,
        "copy_bytes_per_second": copied,
        "ops": [
            {
                "case": x.case.name,
                "seconds": x.seconds,
                "xla_seconds": x.reference_seconds,
                "share": x.case.floor_bytes / x.seconds / copied,
            }
            for x in measured
            if x.seconds is not None
        ],
        "attention": (
            [] if args.only == "ops" else time_attention(console, copied, quick=args.quick)
        ),
    }
    print_tables(console, result)
    if args.json is not None:
        write_json(args.json, result)
    if args.markdown is not None:
        with replacing(args.markdown) as temporary:
            temporary.write_text(times_page(result))
    return 1 if wrong else 0


def runs(console: Console, case: Case) -> bool:
    """Whether the kernel takes the case on this device and JAX; says so if it does not."""
    function, arguments = case.build()
    try:
        jax.eval_shape(function, *arguments)
    except NotImplementedError as e:
        console.print(f"refused {case.name}: {e}")
        return False
    return True


def check_cases(
    console: Console, cases: list[Case], *, timed: bool, references: bool = False
) -> list[Measured]:
    """Compares cases with their references, says what it found, and times those that are right."""
    found = []
    for x in measure_cases(cases, timed=timed, references=references):
        console.print(f"{'WRONG' if x.wrong else 'right'} {x.case.name} {x.wrong or ''}")
        found.append(x)
    return found


def copy_bandwidth() -> float:
    """Bytes per second that a copy of 1 GiB reads and writes."""
    x = jnp.zeros((1 << 28,), jnp.float32)
    copy = jax.jit(lambda x: x + 1.0)
    seconds = median_seconds(lambda: jax.block_until_ready([copy(x) for _ in range(4)]), REPEATS)
    return 2 * x.nbytes * 4 / seconds


if __name__ == "__main__":
    sys.exit(main())
