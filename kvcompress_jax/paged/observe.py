"""Attention mass into the statistics that decide about tokens and pages."""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from kvcompress_jax.paged.attention import AttentionMass
from kvcompress_jax.paged.cache import PagedCache
from kvcompress_jax.paged.heads import gather_heads
from kvcompress_jax.paged.table import PageTable


def observe(
    cache: PagedCache,
    layer: jax.Array | int,
    table: PageTable,
    query_lengths: jax.Array,
    mass: AttentionMass,
) -> PagedCache:
    """Adds the mass of one `attend` call: to tokens of raw pages, and to the heat of sealed pages.

    A token's mean attention is `mass / seen`: the sum alone would favour old tokens.

    Args:
      cache: donated, it is updated in place.
      layer: i32[].
      table: of the same `attend` call.
      query_lengths: i32[sequences], of the same call.
      mass: its result.

    Returns:
      The cache with new `mass`, `seen` and `heat`.

    Raises:
      ValueError: the cache keeps no statistics.
    """
    if not cache.layout.statistics:
        raise ValueError("cache: expected a layout with statistics=True, got False")
    page_size = cache.layout.page_size
    live = _live(table.raw, table.raw_count)
    raw = jnp.where(live, table.raw, cache.raw.shape[1])
    offset = jnp.arange(page_size, dtype=jnp.int32)
    token = table.raw_index[:, :, None] * page_size + offset[None, None, :]
    length = table.length[:, None, None]
    first_query = (table.length - query_lengths)[:, None, None]
    # Queries at max(token, first_query) .. length - 1 could see the token.
    seen = jnp.clip(length - jnp.maximum(token, first_query), 0, None)
    sealed = jnp.where(_live(table.sealed, table.sealed_count), table.sealed, cache.base.shape[1])
    # Head after head: a reduction XLA would merge with that over a head's queries, where no heads
    # have to be gathered, and which page is colder could depend on how many shards there are.
    of_heads = gather_heads(cache.split, mass.sealed, 1)
    of_pages = functools.reduce(jnp.add, [of_heads[:, i] for i in range(of_heads.shape[1])])
    return dataclasses.replace(
        cache,
        mass=cache.mass.at[layer, raw].add(mass.raw.transpose(0, 2, 1, 3), mode="drop"),
        seen=cache.seen.at[layer, raw].add(seen.astype(jnp.float32), mode="drop"),
        heat=cache.heat.at[sealed].add(of_pages, mode="drop"),
    )


def cool(cache: PagedCache, decay: float) -> PagedCache:
    """One step of forgetting: the heat of every sealed page is multiplied by `decay`."""
    return dataclasses.replace(cache, heat=cache.heat * decay)


def _live(ids: jax.Array, count: jax.Array) -> jax.Array:
    return jnp.arange(ids.shape[1], dtype=jnp.int32)[None, :] < count[:, None]
