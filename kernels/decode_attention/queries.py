"""Lists of pages, and queries in tiles, laid out for kernels."""

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
class Window:
    """A sliding window, as kernels see it."""

    span: jax.Array  # i32[1], tokens; 0: everything
    oldest: jax.Array  # i32[sequences], the first token that a query may see


def sliding_window(
    window: jax.Array | int | None, lists: PageLists, query_lengths: jax.Array
) -> Window | None:
    """Of the window of `decode_attention`; None: there is none."""
    if window is None:
        return None
    span = jnp.asarray(window, jnp.int32).reshape(1)
    first_query = lists.length - query_lengths
    return Window(span, jnp.where(span > 0, first_query - span + 1, 0))


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
    window: Window | None,
    *,
    sealed: bool,
    mass: bool,
) -> Listed:
    """What says where a kernel reads.

    Args:
      pools, lists, layer: of `decode_attention`.
      window: the sliding window.
      sealed: whether there are sealed pages at all.
      mass: whether the kernel says what each page received.
    """
    layer = jnp.asarray(layer, jnp.int32).reshape(1)
    page_size = pools.raw.shape[4]
    oldest = None if window is None else window.oldest
    grouped = functools.partial(
        group_pages, page_size=page_size, oldest=oldest, by_level=lists.by_level
    )
    raw, raw_index = _some_columns(lists.raw), _some_columns(lists.raw_index)
    recent = grouped(raw, raw_index, lists.raw_count, fine_of=None)
    arrays = {
        "layer": layer,
        "length": lists.length,
        "raw_ids": recent.ids,
        "raw_index": recent.index,
        "raw_count": recent.plain,
    }
    if mass:
        arrays |= {"raw_column": recent.column}
    if window is not None:
        arrays |= {"span": window.span}
    if not sealed:
        return Listed(arrays, None, recent)
    fine_of = pools.fine_of[layer[0]] if pools.codes.fine_rows else None
    past = grouped(lists.sealed, lists.sealed_index, lists.sealed_count, fine_of=fine_of)
    arrays |= {"ids": past.ids, "plain": past.plain}
    if mass:
        arrays |= {"column": past.column}
    if pools.sink_tokens or window is not None:
        arrays |= {"index": past.index}
    if pools.sink_tokens:
        arrays |= {"sink": lists.sink}
    if past.chunk is not None and past.refined is not None:
        arrays |= {"chunk": past.chunk, "refined": past.refined}
    return Listed(arrays, past, recent)


def _some_columns(x: jax.Array) -> jax.Array:
    """A column that nobody reads where there is none: Triton's route fails on empty arrays, in
    loops of no step too."""
    return x if x.shape[1] else jnp.pad(x, ((0, 0), (0, 1)))


@dataclasses.dataclass(frozen=True)
class Tiled:
    """Columns are the queries of a sequence times the query heads of a KV head, padded to whole
    tiles."""

    q: jax.Array  # [sequences, kv_heads, columns, dim]
    position: jax.Array  # i32[sequences, columns]


def tile_queries(
    q: jax.Array, lists: PageLists, query_lengths: jax.Array, *, kv_heads: int, tile: int
) -> Tiled:
    """Of q [sequences, queries, heads, dim], in tiles of so many columns."""
    rows, queries, all_heads, dim = q.shape
    group = all_heads // kv_heads
    n = queries * group
    padding = -n % tile
    position = (lists.length - query_lengths)[:, None] + jnp.arange(queries, dtype=jnp.int32)[None]
    position = jnp.pad(jnp.repeat(position, group, axis=1), ((0, 0), (0, padding)))
    packed = q.reshape(rows, queries, kv_heads, group, dim).transpose(0, 2, 1, 3, 4)
    packed = packed.reshape(rows, kv_heads, n, dim)
    return Tiled(jnp.pad(packed, ((0, 0), (0, 0), (0, padding), (0, 0))), position)


def untile_queries(x: jax.Array, queries: int) -> jax.Array:
    """Columns of so many queries, without padding, back to heads: from [sequences, kv_heads,
    columns, ...] to [sequences, queries, heads, ...]."""
    rows, kv_heads, n, *rest = x.shape
    x = x.reshape(rows, kv_heads, queries, n // queries, *rest)
    return jnp.moveaxis(x, 1, 2).reshape(rows, queries, -1, *rest)
