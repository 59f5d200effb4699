"""Time of the codec and of attention, and tuning of the kernels, as tables."""

import dataclasses
import platform

import jax
from rich.console import Console
from rich.table import Table

from kvcompress_jax.config import CompressionConfig
from kvcompress_jax.kernels.tuning import measured_folder
from kvcompress_jax.lab.attention_timing import attention_seconds, random_cache
from kvcompress_jax.lab.device import require_gpu
from kvcompress_jax.lab.progress import stages
from kvcompress_jax.lab.timing import time_pages

# name: layers, query heads, KV heads, head dim
SHAPES = {
    "SmolLM2-135M": (30, 9, 3, 64),
    "Qwen2.5-7B-like, 4 layers": (4, 28, 4, 128),
    "Llama-3-8B-like, 4 layers": (4, 32, 8, 128),
}
RECIPES = ("safe", "balanced", "compact")


def tune_and_store(console: Console) -> dict[str, object]:
    """Measures the kernels' settings and stores the best.

    Raises:
      DeviceError: there is no GPU.
    """
    device = require_gpu("bench --tune")
    # Only now: the kernels' cases are many, and take seconds to make.
    from kvcompress_jax.lab.tune_kernels import store, tunables, tune

    results = []
    work = tunables()
    with stages(console) as progress:
        for i, tunable in enumerate(work):
            progress(f"{tunable.op} {tunable.shape}", i / len(work))
            results.append(tune(tunable, device=device))
    table = Table(title=f"{device}: best settings", title_justify="left")
    for column in ("op", "shape", "settings", "µs", "µs by default", "did not work"):
        table.add_column(column)
    for x in results:
        usual = "–" if x.default_seconds is None else f"{x.default_seconds * 1e6:.1f}"
        settings = ", ".join(f"{name} {value}" for name, value in x.best.items())
        best = f"{x.best_seconds * 1e6:.1f}"
        table.add_row(x.op, x.shape, settings, best, usual, str(len(x.failed)))
    console.print(table)
    for file in store(results, device=device, folder=measured_folder()):
        console.print(f"stored: {file}")
    return {"device": device, "results": [dataclasses.asdict(x) for x in results]}


def bench_speed(console: Console, *, tokens: int, repeats: int, quick: bool) -> dict[str, object]:
    """Times compressing, decompressing and attending on the device at hand.

    Args:
      console: for the table.
      tokens: of the context that is attended to.
      repeats: of which the median is taken.
      quick: one shape only.
    """
    shapes = dict(list(SHAPES.items())[:1]) if quick else SHAPES
    title = (
        "ms per 1K tokens to compress and decompress, ms per decode step to attend to"
        f" {tokens} tokens; all layers of the shape"
    )
    table = Table(title=title, title_justify="left")
    for column in ("shape", "recipe", "compress", "decompress", "attend", "attend, uncompressed"):
        table.add_column(column, justify="left" if column in ("shape", "recipe") else "right")
    rows = []
    with stages(console) as progress:
        for name, (layers, heads, kv_heads, dim) in shapes.items():
            progress(name, 0.0)
            raw = _attend(CompressionConfig(), 0, (heads, kv_heads, dim), tokens, repeats) * layers
            for recipe in RECIPES:
                config = CompressionConfig.recipe(recipe)
                layout = config.layout(layers=layers, kv_heads=kv_heads, head_dim=dim)
                times = time_pages(
                    layout, level=config.seal_level, fed=config.feeds_errors_back, repeats=repeats
                )
                attended = _attend(
                    config, config.seal_level, (heads, kv_heads, dim), tokens, repeats
                )
                row = {
                    "shape": name,
                    "recipe": recipe,
                    "compress_ms_per_1k_tokens": times.compress_ms_per_1k_tokens,
                    "decompress_ms_per_1k_tokens": times.decompress_ms_per_1k_tokens,
                    "attend_ms": attended * layers,
                    "attend_uncompressed_ms": raw,
                }
                rows.append(row)
                table.add_row(name, recipe, *(f"{x:.2f}" for x in list(row.values())[2:]))
    console.print(table)
    device = jax.devices()[0].device_kind
    console.print(f"{device}, {platform.machine()}, jax {jax.__version__}, medians")
    return {"device": device, "jax": jax.__version__, "tokens": tokens, "rows": rows}


def _attend(
    config: CompressionConfig, level: int, shape: tuple[int, int, int], tokens: int, repeats: int
) -> float:
    """Milliseconds of one layer's attention."""
    heads, kv_heads, dim = shape
    layout = config.layout(layers=1, kv_heads=kv_heads, head_dim=dim)
    cache, table = random_cache(layout, level=level, sequences=1, tokens=tokens)
    return 1e3 * attention_seconds(cache, table, heads=heads, repeats=repeats)
