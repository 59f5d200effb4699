"""Queries, laid out for kernels: the query heads of a KV head side by side, in tiles."""

import dataclasses

import jax
import jax.numpy as jnp

from kvcompress_jax.kernels.decode_attention.inputs import PageLists


@dataclasses.dataclass(frozen=True)
class Tiled:
    """Columns are the queries of a sequence times the query heads of a KV head, padded to whole
    tiles."""

    q: jax.Array  # [sequences, kv_heads, columns, dim]
    position: jax.Array  # i32[sequences, columns]
    span: jax.Array  # i32[1], the window, or 0
    oldest: jax.Array | None  # i32[sequences], of tokens in the window; None: there is no window


def tile_queries(
    q: jax.Array,
    lists: PageLists,
    query_lengths: jax.Array,
    *,
    kv_heads: int,
    window: jax.Array | int | None,
    tile: int,
) -> Tiled:
    """Of q [sequences, queries, heads, dim], in tiles of so many columns."""
    rows, queries, all_heads, dim = q.shape
    group = all_heads // kv_heads
    n = queries * group
    padding = -n % tile
    first_query = lists.length - query_lengths
    position = first_query[:, None] + jnp.arange(queries, dtype=jnp.int32)[None, :]
    position = jnp.pad(jnp.repeat(position, group, axis=1), ((0, 0), (0, padding)))
    packed = q.reshape(rows, queries, kv_heads, group, dim).transpose(0, 2, 1, 3, 4)
    packed = packed.reshape(rows, kv_heads, n, dim)
    packed = jnp.pad(packed, ((0, 0), (0, 0), (0, padding), (0, 0)))
    oldest = None
    span = jnp.zeros((1,), jnp.int32)
    if window is not None:
        span = jnp.asarray(window, jnp.int32).reshape(1)
        oldest = jnp.where(span > 0, first_query - span + 1, 0)
    return Tiled(packed, position, span, oldest)
