"""What was measured on a GPU, as tables: in the terminal and in Markdown."""

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.gpu.markdown import row
from benchmarks.gpu.roofline import EVEN

OPS = ("op/size", "µs", "of copy bandwidth", "XLA, µs", "XLA / kernel")
ATTENTION = (
    "shape",
    "sequences × tokens",
    "level",
    "implementation",
    "µs",
    "of copy bandwidth",
    "raw / this",
    "XLA / this",
)
HEAD = """# Measured on {device}

Made by `python -m benchmarks.gpu_bench` with JAX {jax}; medians of {repeats}. Every result was
compared with its reference before. A copy of 1 GiB reads and writes {copied:,.0f} GB/s here: *of
copy bandwidth* is the bytes that an op has to move, each once, by the time it takes, over that.
"""
ATTENTION_HEAD = """
## Decode attention
One layer of a decode step, all that `attend` does; 32 follow each other in one program, over four
layers of a cache. *raw / this* is attention to an uncompressed paged cache by the same
implementation, *XLA / this* the plain XLA path at the same level. *Level 1* has 8 bits for all
tokens, *mixed* for half of them and 4 bits for the others, *level 2* 4 bits for all.
"""
EVEN_HEAD = "*Even* has 6 bits for all tokens, in as many bytes as *mixed*.\n"


def times_page(result: Mapping[str, Any]) -> str:
    """Markdown of what `gpu_bench` found."""
    copied = result["copy_bytes_per_second"] / 1e9
    parts = [HEAD.format(**result, copied=copied)]
    if result["attention"]:
        timed = {row["level"] for row in result["attention"]}
        parts += [ATTENTION_HEAD, *([EVEN_HEAD] if EVEN in timed else [])]
        parts += [_markdown(ATTENTION, _attention(result))]
    if result["ops"]:
        parts += ["\n## Ops\n", _markdown(OPS, _ops(result))]
    return "\n".join(parts) + "\n"


def print_tables(console: Console, result: Mapping[str, Any]) -> None:
    """The same in the terminal."""
    copied = result["copy_bytes_per_second"] / 1e9
    device, jax = result["device"], result["jax"]
    console.print(f"{device}, jax {jax}; copies {copied:,.0f} GB/s")
    for title, columns, rows in (
        ("ops", OPS, _ops(result)),
        ("decode attention, one layer", ATTENTION, _attention(result)),
    ):
        table = Table(title=title, title_justify="left")
        for column in columns:
            table.add_column(column)
        for cells in rows:
            table.add_row(*cells)
        console.print(table)


def _ops(result: Mapping[str, Any]) -> list[list[str]]:
    rows = []
    for x in result["ops"]:
        took, xla = x["seconds"], x["xla_seconds"]
        beside = ["–", "–"] if xla is None else [f"{xla * 1e6:.1f}", f"{xla / took:.1f}"]
        rows.append([x["case"], f"{took * 1e6:.1f}", f"{x['share']:.0%}", *beside])
    return rows


def _attention(result: Mapping[str, Any]) -> list[list[str]]:
    return [
        [
            x["shape"],
            f"{x['sequences']} × {x['tokens']:,}",
            x["level"],
            x["implementation"],
            f"{x['seconds'] * 1e6:.1f}",
            f"{x['share']:.0%}",
            f"{x['raw_over_this']:.2f}",
            f"{x['xla_over_this']:.1f}",
        ]
        for x in result["attention"]
    ]


def _markdown(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join(row(line) for line in lines)
