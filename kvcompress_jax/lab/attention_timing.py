"""Time of a decode step's attention to a cache of random pages, on the device at hand."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

from kvcompress_jax.codec import Scale
from kvcompress_jax.lab.timing import median_seconds
from kvcompress_jax.paged import (
    CacheLayout,
    PagedCache,
    PageTable,
    PoolSizes,
    attend,
    init_cache,
    order_by_level,
)


def random_cache(
    layout: CacheLayout, *, level: int, sequences: int, tokens: int
) -> tuple[PagedCache, PageTable]:
    """A cache whose pages are full of random codes, or random numbers at level 0, and its table.

    Args:
      layout: of the cache.
      level: 0, 1 or 2 of all pages.
      sequences: of the table.
      tokens: of each sequence, a multiple of the page size.
    """
    pages = tokens // layout.page_size
    total = sequences * pages
    fine = level == 1 and layout.fine_rows > 0
    sizes = PoolSizes(
        raw_pages=total if level == 0 else 1,
        sealed_pages=0 if level == 0 else total,
        fine_chunks=layout.layers * total if fine else 0,
        sink_slots=0,
    )
    cache = init_cache(layout, sizes)
    keys = jax.random.split(jax.random.key(0), 3)
    if level == 0:
        raw = jax.random.normal(keys[0], cache.raw.shape, cache.raw.dtype)
        cache = dataclasses.replace(cache, raw=raw)
    else:

        def unit(scale: Scale) -> Scale:
            """With it, codes stand for about -2 to 2."""
            return Scale(step=jnp.full_like(scale.step, 0.25), zero=jnp.full_like(scale.zero, -7.5))

        slots = jnp.arange(layout.page_size, dtype=jnp.uint8)
        cache = dataclasses.replace(
            cache,
            base=jax.random.bits(keys[1], cache.base.shape, jnp.uint8),
            fine=jax.random.bits(keys[2], cache.fine.shape, jnp.uint8),
            key_scale=unit(cache.key_scale),
            value_scale=unit(cache.value_scale),
            order=jnp.broadcast_to(slots, cache.order.shape),
            sealed=jnp.ones_like(cache.sealed),
        )
        if fine:
            chunks = jnp.arange(layout.layers * total, dtype=jnp.int32)
            cache = dataclasses.replace(cache, fine_of=chunks.reshape(layout.layers, total))
    ids = jax.random.permutation(keys[0], jnp.arange(total, dtype=jnp.int32))
    columns = ids.reshape(sequences, pages)
    index = jnp.broadcast_to(jnp.arange(pages, dtype=jnp.int32), columns.shape)
    count = jnp.full((sequences,), pages, jnp.int32)
    none = jnp.zeros((sequences, 0), jnp.int32)
    uncompressed = level == 0
    return cache, PageTable(
        sealed=none if uncompressed else columns,
        sealed_index=none if uncompressed else index,
        sealed_count=jnp.zeros_like(count) if uncompressed else count,
        raw=columns if uncompressed else none,
        raw_index=index if uncompressed else none,
        raw_count=count if uncompressed else jnp.zeros_like(count),
        sink=jnp.full((sequences,), -1, jnp.int32),
        length=jnp.full((sequences,), tokens, jnp.int32),
    )


def attention_step(
    implementation: str | None = None, *, rounds: int = 1
) -> Callable[[jax.Array, PagedCache, PageTable], jax.Array]:
    """A decode step's attention: to all layers of a cache, one after the other, as a decoder does.

    Args:
      implementation: of `attend`.
      rounds: how often it attends to all of them, as if there were so many times the layers.

    Returns:
      A function of queries [sequences, 1, heads, dim], a cache and a table.
    """

    def step(q: jax.Array, cache: PagedCache, table: PageTable) -> jax.Array:
        def body(layer: jax.Array, q: jax.Array) -> jax.Array:
            layer = lax.rem(layer, jnp.int32(layers))
            out, _, _ = attend(q, cache, layer, table, implementation=implementation)
            return q + out  # the next layer has to wait

        layers = cache.layout.layers
        table = order_by_level(cache, table)
        return lax.fori_loop(0, rounds * layers, body, q)

    return step


def random_queries(layout: CacheLayout, *, sequences: int, heads: int) -> jax.Array:
    """Of the newest token of each sequence, [sequences, 1, heads, dim]."""
    shape = (sequences, 1, heads, layout.head_dim)
    return jax.random.normal(jax.random.key(1), shape, layout.jax_dtype)


def attention_seconds(
    cache: PagedCache, table: PageTable, *, heads: int, repeats: int = 5
) -> float:
    """Median time of one layer's attention in a decode step.

    Args:
      cache: to attend to.
      table: of its sequences.
      heads: of the queries.
      repeats: looks at the clock.
    """
    q = random_queries(cache.layout, sequences=table.length.shape[0], heads=heads)
    step = jax.jit(attention_step())
    took = median_seconds(lambda: jax.block_until_ready(step(q, cache, table)), repeats)
    return took / cache.layout.layers
