"""How long attention to the cache must take at least, and what plain XLA moves beside that.

A decode step reads each stored byte of keys and values once; the floor is the time that the
device's memory needs for them at its nominal bandwidth.
"""

import dataclasses
from collections.abc import Mapping, Sequence

from benchmarks.gpu.markdown import row
from benchmarks.gpu.target import NAMES, Target
from kvcompress_jax.paged.layout import SCALE_BYTES

PAGE_SIZE = 64
LEVELS = {
    "raw": "bfloat16",
    "level 1": "8 bits for all tokens",
    "mixed": "8 bits for half of the tokens of each page, 4 for the others",
    "level 2": "4 bits for all tokens",
}
EVEN = "even"  # 6 bits for all tokens, in as many bytes as mixed
FINE_ROWS = {"level 1": PAGE_SIZE, "mixed": PAGE_SIZE // 2, EVEN: PAGE_SIZE // 2, "level 2": 0}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shape:
    """Attention of a model."""

    name: str
    layers: int
    heads: int
    kv_heads: int
    dim: int


SHAPES = (
    Shape(name="Llama-3-8B-like", layers=32, heads=32, kv_heads=8, dim=128),
    Shape(name="Qwen2.5-7B-like", layers=28, heads=28, kv_heads=4, dim=128),
)
BATCHES = ((1, 8192), (1, 131072), (8, 32768), (32, 8192), (64, 4096))
COMPILED = (8, 32768)  # sequences and tokens of which XLA's program is looked at


def page_bytes(shape: Shape, level: str) -> int:
    """That attention reads of a page of one layer: codes and scales, not the order of tokens."""
    values = 2 * shape.kv_heads * PAGE_SIZE * shape.dim
    if level == "raw":
        return 2 * values
    fine = shape.kv_heads * FINE_ROWS[level] * shape.dim
    return values // 2 + fine + shape.kv_heads * (shape.dim + PAGE_SIZE) * SCALE_BYTES


def step_bytes(shape: Shape, level: str, sequences: int, tokens: int) -> int:
    """That attention of one decode step reads, all layers."""
    return shape.layers * sequences * (tokens // PAGE_SIZE) * page_bytes(shape, level)


HEAD = """# Floors of decode attention

Made by `make gpu-roofline`. **Computed, not timed.** The floor of a decode step is the time that
the device's memory needs, at its nominal bandwidth, for each stored byte of keys and values of all
layers, once. A kernel cannot be faster; how near it comes on an H100 is in
[gpu-times.md](gpu-times.md). Pages of {page} tokens; scales are counted.

{levels}
"""
XLA = """
## What plain XLA moves

The fallback, `attend` in XLA, as compiled for an {device}, at {sequences} sequences of {tokens:,}
tokens, one layer. It writes what it decodes before it reads it again. Counted between operations,
whether memory sees them or a cache; a block of decoded keys and values is 64 MiB. The fused
kernels' bytes over the floor are in [gpu-gate.md](gpu-gate.md).
"""


def roofline_page(
    targets: Sequence[Target], compiled: Mapping[str, Mapping[str, int]], compiled_for: str
) -> str:
    """Markdown.

    Args:
      targets: columns.
      compiled: bytes that XLA's program of one layer moves, by shape and level.
      compiled_for: name of the target of that program.
    """
    levels = "\n".join(f"- {name}: {meaning}." for name, meaning in LEVELS.items())
    lines = [HEAD.format(page=PAGE_SIZE, levels=levels)]
    names = [f"{NAMES[x.name]} ({x.bandwidth / 1e12:.2f} TB/s)" for x in targets]
    for shape in SHAPES:
        lines.append(
            f"\n## {shape.name}: {shape.layers} layers, {shape.kv_heads} KV heads of {shape.dim}\n"
        )
        lines.append(row(["sequences × tokens", "level", "GB per step", *names]))
        lines.append(row(["---"] * (3 + len(names))))
        for sequences, tokens in BATCHES:
            for level in LEVELS:
                size = step_bytes(shape, level, sequences, tokens)
                times = [f"{size / x.bandwidth * 1e3:.3f} ms" for x in targets]
                cells = [f"{sequences} × {tokens:,}", level, f"{size / 1e9:.2f}", *times]
                lines.append(row(cells))
    sequences, tokens = COMPILED
    lines.append(XLA.format(device=NAMES[compiled_for], sequences=sequences, tokens=tokens))
    lines.append(row(["shape", "level", "floor, MB", "XLA, MB", "XLA over the floor"]))
    lines.append(row(["---"] * 5))
    for shape in SHAPES:
        for level in LEVELS:
            floor = step_bytes(shape, level, sequences, tokens) / shape.layers
            moved = compiled[shape.name][level]
            cells = [f"{floor / 1e6:,.0f}", f"{moved / 1e6:,.0f}", f"{moved / floor:.1f}"]
            lines.append(row([shape.name, level, *cells]))
    return "\n".join(lines) + "\n"
