"""Time to compress and to decompress pages on the device at hand."""

import dataclasses
import functools
import statistics
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from kvcompress_jax.calibrated.code import CalibratedCode
from kvcompress_jax.feedback import RANK, KeyFeedback
from kvcompress_jax.paged import (
    CacheLayout,
    PagedCache,
    PoolSizes,
    Sealing,
    decode_pages,
    init_cache,
    seal,
)
from kvcompress_jax.paged.raw_bits import bits

PAGES = 16


@dataclasses.dataclass(frozen=True)
class PageTimes:
    """Milliseconds for 1,000 tokens, keys and values of all layers; medians."""

    compress_ms_per_1k_tokens: float
    decompress_ms_per_1k_tokens: float


def time_pages(
    layout: CacheLayout,
    *,
    level: int,
    code: CalibratedCode | None = None,
    fed: bool = False,
    repeats: int = 5,
) -> PageTimes:
    """Times `seal` and `decode_pages` on random pages.

    Args:
      layout: of the cache.
      level: 1, 2 or 3.
      code: of level 3.
      fed: whether keys are rounded with error feedback.
      repeats: timed runs, after one that is not.
    """
    fine = level == 1 and layout.fine_rows > 0
    sizes = PoolSizes(
        raw_pages=PAGES,
        sealed_pages=PAGES,
        fine_chunks=PAGES * layout.layers if fine else 0,
        sink_slots=0,
    )
    cache = init_cache(layout, sizes, code, feedback=_no_feedback(layout) if fed else None)
    numbers = np.random.default_rng(0).standard_normal(cache.raw.shape, np.float32)
    cache = dataclasses.replace(cache, raw=jnp.asarray(numbers.astype(cache.raw.dtype)))
    chunk = jnp.arange(PAGES * layout.layers, dtype=jnp.int32).reshape(PAGES, layout.layers)
    pages = jnp.arange(PAGES, dtype=jnp.int32)
    work = Sealing(
        raw=pages,
        page=pages,
        chunks=chunk if fine else jnp.full_like(chunk, -1),
        first=jnp.zeros((PAGES,), jnp.int32),
        sink=jnp.full((PAGES,), -1, jnp.int32),
        count=jnp.int32(PAGES),
    )
    sealer = jax.jit(seal, donate_argnums=0)

    def compress() -> None:
        nonlocal cache
        cache = jax.block_until_ready(sealer(cache, work))

    compress_seconds = median_seconds(compress, repeats)
    opener = jax.jit(functools.partial(_decode_all, dtype=layout.jax_dtype))
    decompress_seconds = median_seconds(lambda: jax.block_until_ready(opener(cache)), repeats)
    per_1k = 1e6 / (PAGES * layout.page_size)
    return PageTimes(compress_seconds * per_1k, decompress_seconds * per_1k)


def _no_feedback(layout: CacheLayout) -> KeyFeedback:
    """Feedback of nothing, which takes as long as that of something."""
    half = layout.head_dim // 2
    nothing = jnp.zeros((layout.layers, layout.kv_heads, 2, half, RANK), jnp.float32)
    return KeyFeedback(carry=nothing, answer=nothing, frequencies=jnp.ones((layout.layers, half)))


def _decode_all(cache: PagedCache, dtype: jnp.dtype) -> tuple[jax.Array, jax.Array]:
    def one_layer(layer: jax.Array) -> tuple[jax.Array, jax.Array]:
        ids = jnp.arange(PAGES, dtype=jnp.int32)
        keys, values = decode_pages(cache, layer, ids, dtype=dtype)
        # As the raw pool would be written: JAX before 0.12 stacks bfloat16 by way of a float32 copy
        # of the whole stack, once per layer.
        return bits(keys), bits(values)

    return jax.lax.map(one_layer, jnp.arange(cache.layout.layers, dtype=jnp.int32))


def median_seconds(work: Callable[[], object], repeats: int) -> float:
    """Median wall time of `repeats` runs, after one to warm up."""
    work()
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)
