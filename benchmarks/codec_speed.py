"""Time to compress and to decompress pages, beside copying them, for shapes of real models.

    make bench
    make bench BENCH_ARGS="--quick"

Prints a table: milliseconds for 1,000 tokens of all layers, medians, on the device at hand. The
result is checked before it is timed.
"""

import argparse
import platform

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.table import Table

from kvcompress_jax.config import CompressionConfig
from kvcompress_jax.lab.timing import median_seconds, time_pages
from kvcompress_jax.transforms import compress_kv_block, decompress_kv_block

# name: layers, KV heads, head dim
SHAPES = {
    "SmolLM2-135M": (30, 3, 64),
    "Qwen2.5-7B-like, 4 layers": (4, 4, 128),
    "Llama-3-8B-like, 4 layers": (4, 8, 128),
    "Gemma-3-1B-like, 4 layers": (4, 1, 256),
}
RECIPES = ("safe", "balanced", "mixed", "compact")


def check(heads: int, dim: int) -> None:
    """Levels are within the bound of their bits, and 4 bits are not as good as 8."""
    block = jax.random.normal(jax.random.key(0), (2, 64, heads, dim)).astype(jnp.bfloat16)
    error = {}
    for level, ratio in ((1, 1.0), (2, 1.0)):
        back = decompress_kv_block(compress_kv_block(block, level, CompressionConfig(ratio=ratio)))
        error[level] = float(np.abs(np.asarray(back - block, np.float32)).max())
    extent = float(jnp.max(block) - jnp.min(block))
    if not (error[2] <= extent / 28 and error[1] < error[2] / 4):
        raise SystemExit(f"wrong results, nothing timed: {error}")


def main() -> None:
    """Checks, times and prints."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="one shape, three repeats")
    parser.add_argument("--nearest", action="store_true", help="without error feedback")
    args = parser.parse_args()
    shapes = dict(list(SHAPES.items())[:1]) if args.quick else SHAPES
    repeats = 3 if args.quick else 7
    table = Table(title="ms per 1K tokens, all layers of the shape", title_justify="left")
    for column in ("shape", "recipe", "compress", "decompress", "copy of the raw pages"):
        table.add_column(column, justify="left" if column in ("shape", "recipe") else "right")
    for name, (layers, heads, dim) in shapes.items():
        check(heads, dim)
        raw = jnp.ones((layers, 16, 2, heads, 64, dim), jnp.bfloat16)
        copy = jax.jit(lambda x: x + jnp.bfloat16(1))
        copied = median_seconds(lambda: jax.block_until_ready(copy(raw)), repeats) * 1e6 / 1024  # noqa: B023
        for recipe in RECIPES:
            config = CompressionConfig.recipe(recipe)
            layout = config.layout(layers=layers, kv_heads=heads, head_dim=dim)
            fed = config.feeds_errors_back and not args.nearest
            times = time_pages(layout, level=config.seal_level, fed=fed, repeats=repeats)
            table.add_row(
                name,
                recipe,
                f"{times.compress_ms_per_1k_tokens:.1f}",
                f"{times.decompress_ms_per_1k_tokens:.1f}",
                f"{copied:.1f}",
            )
    console = Console()
    console.print(table)
    device = jax.devices()[0]
    console.print(
        f"{device.device_kind}, {platform.machine()}, jax {jax.__version__}, medians of {repeats}"
    )


if __name__ == "__main__":
    main()
