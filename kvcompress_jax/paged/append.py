"""New tokens into raw pages."""

import dataclasses

import jax
import jax.numpy as jnp

from kvcompress_jax.paged.cache import PagedCache
from kvcompress_jax.paged.raw_bits import to_pool


def append(
    cache: PagedCache, layer: jax.Array | int, k: jax.Array, v: jax.Array, slots: jax.Array
) -> PagedCache:
    """Writes keys and values of one layer into raw pages and resets their attention statistics.

    Args:
      cache: donated, it is updated in place.
      layer: i32[].
      k: floating [tokens, heads, dim], after RoPE; rounded to the cache's dtype.
      v: like k.
      slots: i32[tokens], `raw page * page_size + offset`; negative ones are padding.

    Returns:
      The cache with the tokens in it.

    Raises:
      ValueError: k or v has another shape than [tokens, heads, dim] of this cache.
    """
    layout = cache.layout
    expected = (slots.shape[0], layout.kv_heads, layout.head_dim)
    for name, x in (("k", k), ("v", v)):
        if x.shape != expected:
            raise ValueError(f"{name}: expected {list(expected)}, got {list(x.shape)}")
    # Out of range on purpose for padding: mode="drop" ignores too large indices, while negative
    # ones would count from the end.
    page = jnp.where(slots < 0, cache.raw.shape[1], slots // layout.page_size)
    offset = slots % layout.page_size
    at = (layer, page, slice(None), slice(None), offset)
    kv = jnp.stack([k, v], axis=1)  # [tokens, 2, heads, dim]
    kv = to_pool(kv, cache.raw, layout.jax_dtype)
    cache = dataclasses.replace(cache, raw=cache.raw.at[at].set(kv, mode="drop"))
    if not layout.statistics:
        return cache
    return dataclasses.replace(
        cache,
        mass=cache.mass.at[layer, page, :, offset].set(0.0, mode="drop"),
        seen=cache.seen.at[layer, page, offset].set(0.0, mode="drop"),
    )
