"""Times the GPU kernels on the GPU at hand, after checking what they give.

    python -m benchmarks.gpu_bench [--quick] [--json FILE]
    python -m benchmarks.gpu_bench --interpret    # on any device: checks small cases, times nothing

Prints a table of ops (time, share of the measured copy bandwidth at the bytes that the op has to
move, ratio to the XLA path) and one of decode attention (ratios to attention to an uncompressed
cache, and to the XLA path). Exits 1 when a result is wrong, 2 without a GPU.
"""

import argparse
import functools
import platform
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from rich.console import Console
from rich.table import Table

from benchmarks.gpu.cases import all_cases
from benchmarks.gpu.roofline import FINE_ROWS, LEVELS, PAGE_SIZE, SHAPES, Shape, page_bytes
from kvcompress_jax.kernels.case import Case
from kvcompress_jax.kernels.decode_attention import cases as decode_cases
from kvcompress_jax.kernels.hadamard import cases as hadamard_cases
from kvcompress_jax.kernels.open_page import cases as open_cases
from kvcompress_jax.kernels.seal_page import cases as seal_cases
from kvcompress_jax.lab.agreement import disagreement
from kvcompress_jax.lab.attention_timing import attention_seconds, random_cache
from kvcompress_jax.lab.device import DeviceError, require_gpu
from kvcompress_jax.lab.kernel_timing import function_seconds
from kvcompress_jax.lab.output import write_json
from kvcompress_jax.lab.timing import median_seconds
from kvcompress_jax.paged import CacheLayout, attend
from kvcompress_jax.paged.attention import IMPLEMENTATIONS

CALLS = 20  # between two looks at the clock
REPEATS = 7
BATCHES = ((1, 32768), (8, 32768), (32, 8192))


def main() -> int:
    """Checks, times and prints; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="one shape and batch of attention")
    parser.add_argument("--interpret", action="store_true", help="check small cases on any device")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results there too")
    args = parser.parse_args()
    console = Console()
    if args.interpret:
        cases = [
            seal_cases.make_case(16, 64, 8, "bfloat16", True, pages=2, interpret=True),
            open_cases.make_case(16, 64, 8, "bfloat16", pages=2, interpret=True),
            hadamard_cases.make_case(64, "bfloat16", vectors=128, interpret=True),
            decode_cases.make_case(16, 64, 8, 2, "bfloat16", "mass", tokens=64, interpret=True),
        ]
        return 1 if check_cases(console, cases) else 0
    try:
        device = require_gpu("gpu_bench")
    except DeviceError as e:
        print(e, file=sys.stderr)
        return 2
    cases = [
        case for case in all_cases() if case.example and case.reference and runs(console, case)
    ]
    if check_cases(console, cases) | check_attention(console):
        return 1
    copied = copy_bandwidth()
    console.print(
        f"{device}, {platform.machine()}, jax {jax.__version__}, medians of {REPEATS};"
        f" copies {copied / 1e9:,.0f} GB/s"
    )
    result = {
        "device": device,
        "jax": jax.__version__,
        "copy_bytes_per_second": copied,
        "ops": time_cases(console, cases, copied),
        "attention": time_attention(console, copied, quick=args.quick),
    }
    if args.json is not None:
        write_json(args.json, result)
    return 0


def runs(console: Console, case: Case) -> bool:
    """Whether the kernel takes the case on this device and JAX; says so if it does not."""
    function, arguments = case.build()
    try:
        jax.eval_shape(function, *arguments)
    except NotImplementedError as e:
        console.print(f"refused {case.name}: {e}")
        return False
    return True


def check_cases(console: Console, cases: list[Case]) -> bool:
    """Compares each case with its reference; returns whether any is wrong."""
    wrong = False
    for case in cases:
        assert case.example is not None and case.reference is not None
        function, _ = case.build()
        arguments = case.example()
        got, want = jax.jit(function)(*arguments), jax.jit(case.reference)(*arguments)
        difference = disagreement(got, want, relative_from=case.relative_from)
        wrong = wrong or difference is not None
        console.print(f"{'WRONG' if difference else 'right'} {case.name} {difference or ''}")
    return wrong


def check_attention(console: Console) -> bool:
    """Compares every implementation of attention with XLA's; returns whether any is wrong."""
    wrong = False
    for shape in SHAPES:
        for level in LEVELS:
            layout, number = _layout(shape, level)
            cache, table = random_cache(layout, level=number, sequences=2, tokens=512)
            q = jax.random.normal(jax.random.key(2), (2, 1, shape.heads, shape.dim), jnp.bfloat16)
            outputs = {}
            for name in IMPLEMENTATIONS:
                step = jax.jit(functools.partial(attend, layer=0, implementation=name))
                try:
                    outputs[name] = step(q, cache, table=table)[:2]
                except NotImplementedError as e:
                    console.print(f"refused attend/{name} {shape.name} {level}: {e}")
            for name, output in outputs.items():
                difference = disagreement(output, outputs["xla"])
                wrong = wrong or difference is not None
                verdict = "WRONG" if difference else "right"
                console.print(f"{verdict} attend/{name} {shape.name} {level} {difference or ''}")
    return wrong


def copy_bandwidth() -> float:
    """Bytes per second that a copy of 1 GiB reads and writes."""
    x = jnp.zeros((1 << 28,), jnp.float32)
    copy = jax.jit(lambda x: x + 1.0)
    seconds = median_seconds(lambda: jax.block_until_ready([copy(x) for _ in range(4)]), REPEATS)
    return 2 * x.nbytes * 4 / seconds


def time_cases(console: Console, cases: list[Case], copied: float) -> list[dict[str, Any]]:
    """Each op's case beside its XLA reference."""
    table = Table(title="ops", title_justify="left")
    for column in ("case", "µs", "of copy bandwidth", "XLA, µs", "XLA / kernel"):
        table.add_column(column, justify="left" if column == "case" else "right")
    rows = []
    for case in cases:
        assert case.example is not None and case.reference is not None
        arguments = case.example()

        kernel, xla = (
            function_seconds(f, arguments, donate=case.donate, calls=CALLS, repeats=REPEATS)
            for f in (case.build()[0], case.reference)
        )
        share = case.floor_bytes / kernel / copied
        rows.append({"case": case.name, "seconds": kernel, "xla_seconds": xla, "share": share})
        cells = f"{kernel * 1e6:.1f}", f"{share:.0%}", f"{xla * 1e6:.1f}", f"{xla / kernel:.2f}"
        table.add_row(case.name, *cells)
    console.print(table)
    return rows


def time_attention(console: Console, copied: float, *, quick: bool) -> list[dict[str, Any]]:
    """One decode step of one layer, for all implementations and levels."""
    table = Table(title="decode attention, one layer", title_justify="left")
    columns = ("shape", "sequences × tokens", "level", "implementation", "µs")
    for column in (*columns, "of copy bandwidth", "raw / this", "XLA / this"):
        table.add_column(column)
    rows = []
    for shape in SHAPES[:1] if quick else SHAPES:
        for sequences, tokens in BATCHES[:1] if quick else BATCHES:
            seconds: dict[tuple[str, str], float] = {}
            for level in LEVELS:
                layout, number = _layout(shape, level)
                cache, pages = random_cache(
                    layout, level=number, sequences=sequences, tokens=tokens
                )
                for name in IMPLEMENTATIONS:
                    try:
                        seconds[level, name] = attention_seconds(
                            cache,
                            pages,
                            heads=shape.heads,
                            implementation=name,
                            repeats=REPEATS,
                            calls=CALLS,
                        )
                    except NotImplementedError:
                        continue  # `check_attention` has said why
            for (level, name), took in seconds.items():
                size = sequences * (tokens // PAGE_SIZE) * page_bytes(shape, level)
                row = {
                    "shape": shape.name,
                    "sequences": sequences,
                    "tokens": tokens,
                    "level": level,
                    "implementation": name,
                    "seconds": took,
                    "share": size / took / copied,
                    "raw_over_this": seconds["raw", name] / took,
                    "xla_over_this": seconds[level, "xla"] / took,
                }
                rows.append(row)
                table.add_row(
                    shape.name,
                    f"{sequences} × {tokens}",
                    level,
                    name,
                    f"{took * 1e6:.1f}",
                    f"{row['share']:.0%}",
                    f"{row['raw_over_this']:.2f}",
                    f"{row['xla_over_this']:.2f}",
                )
    console.print(table)
    return rows


def _layout(shape: Shape, level: str) -> tuple[CacheLayout, int]:
    """A layout of one layer, and the level of its pages."""
    layout = CacheLayout(
        layers=1,
        kv_heads=shape.kv_heads,
        head_dim=shape.dim,
        page_size=PAGE_SIZE,
        fine_rows=FINE_ROWS.get(level, 0),
        sink_tokens=0,
    )
    return layout, 0 if level == "raw" else (1 if layout.fine_rows else 2)


if __name__ == "__main__":
    sys.exit(main())
