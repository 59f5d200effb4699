"""Queries and lists of pages, laid out for kernels: what all of them take alike."""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from kvcompress_jax.kernels.decode_attention.inputs import (
    AttentionPools,
    Groups,
    PageLists,
    group_pages,
)


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


@dataclasses.dataclass(frozen=True)
class Listed:
    """Arrays that kernels take by name, and pages in the order in which they are read."""

    arrays: dict[str, jax.Array]
    past: Groups | None  # sealed pages; None: there are none
    recent: Groups  # raw pages


def list_pages(
    pools: AttentionPools,
    lists: PageLists,
    layer: jax.Array | int,
    tiled: Tiled,
    *,
    sealed: bool,
) -> Listed:
    """What says where a kernel reads.

    Args:
      pools, lists, layer: of `decode_attention`.
      tiled: the queries.
      sealed: whether there are sealed pages at all.
    """
    layer = jnp.asarray(layer, jnp.int32).reshape(1)
    page_size = pools.raw.shape[4]
    grouped = functools.partial(group_pages, page_size=page_size, oldest=tiled.oldest)
    recent = grouped(lists.raw, lists.raw_index, lists.raw_count, fine_of=None)
    arrays = {
        "layer": layer,
        "q": tiled.q,
        "position": tiled.position,
        "length": lists.length,
        "span": tiled.span,
        "raw_ids": recent.ids,
        "raw_index": recent.index,
        "raw_column": recent.column,
        "raw_count": recent.counts[:, 1],
    }
    if not sealed:
        return Listed(arrays, None, recent)
    fine_of = pools.fine_of[layer[0]] if pools.codes.fine_rows else None
    past = grouped(lists.sealed, lists.sealed_index, lists.sealed_count, fine_of=fine_of)
    arrays |= {"ids": past.ids, "column": past.column, "counts": past.counts}
    if pools.sink_tokens:
        exact = (past.index == 0) & (lists.sink >= 0)[:, None]
        arrays |= {"skip": jnp.where(exact, pools.sink_tokens, 0)}
    if tiled.oldest is not None:
        arrays |= {"index": past.index}
    if fine_of is not None:
        arrays |= {"chunk": past.chunk}
    return Listed(arrays, past, recent)
