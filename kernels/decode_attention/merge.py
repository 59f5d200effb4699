"""Shares of the attention of a sequence into one, and what pages received."""

from collections.abc import Mapping

import jax
import jax.numpy as jnp

from kvcompress_jax.kernels.decode_attention.inputs import Groups

LN2 = 0.6931471805599453


def merge(
    shares: Mapping[str, jax.Array],
    q: jax.Array,
    *,
    kv_heads: int,
    query_lengths: jax.Array,
    past: Groups | None,
    recent: Groups,
    columns: tuple[int, int],
) -> tuple[jax.Array, jax.Array, tuple[jax.Array, jax.Array] | None]:
    """The results of `decode_attention` from what the programs of its kernel left.

    Args:
      shares: out [rows, kv_heads, splits, dim, width], lse (of base 2, very negative where
        nothing was seen) f32[rows, kv_heads, splits, width]; and for the mass page_lse f32[rows,
        kv_heads, max_sealed, width] and logits f32[rows, kv_heads, max_raw, page_size, width],
        where only pages that were read are written.
      q: the queries.
      kv_heads: of the cache.
      query_lengths: i32[rows].
      past, recent: sealed and raw pages in the order in which they were read.
      columns: max_sealed and max_raw.
    """
    rows, queries, all_heads, _ = q.shape
    group = all_heads // kv_heads
    n = queries * group
    real = jnp.arange(queries, dtype=jnp.int32)[None, :] < query_lengths[:, None]
    real = jnp.repeat(real, group, axis=1)[:, None, :]  # [rows, 1, n]
    lse = shares["lse"][..., :n]
    top = jnp.max(lse, axis=2)
    weight = jnp.exp2(lse - top[:, :, None])
    weight = jnp.where(lse > -1e29, weight, 0.0)
    total = jnp.sum(weight, axis=2)
    some = real & (total > 0)
    total = jnp.where(some, total, 1.0)
    parts = shares["out"].astype(jnp.float32)
    out = jnp.sum(parts[..., :n] * weight[:, :, :, None, :], axis=2) / total[:, :, None]
    out = jnp.where(some[:, :, None], out, 0.0)  # [rows, kv_heads, dim, n]
    both = jnp.where(some, top + jnp.log2(total), -jnp.inf)

    def by_query(x: jax.Array) -> jax.Array:
        """[rows, kv_heads, ..., n] to [rows, queries, heads, ...]."""
        x = jnp.moveaxis(x, -1, 2)
        x = x.reshape(rows, kv_heads, queries, group, *x.shape[3:])
        return jnp.moveaxis(x, 1, 2).reshape(rows, queries, all_heads, *x.shape[4:])

    mass = None
    if "page_lse" in shares:
        against = jnp.where(some, both, jnp.inf)

        def received(logits: jax.Array, groups: Groups | None, count: int) -> jax.Array:
            """Of pages, summed over queries: from [rows, kv_heads, columns, ..., width]."""
            if groups is None or not count:
                return jnp.zeros((*logits.shape[:2], count, *logits.shape[3:-1]), jnp.float32)
            read = (
                jnp.arange(count, dtype=jnp.int32)[None, :]
                < jnp.sum(groups.counts, axis=1)[:, None]
            )
            was_read = jnp.put_along_axis(
                jnp.zeros(read.shape, bool), groups.column, read, axis=1, inplace=False
            )
            extra = (1,) * (logits.ndim - 4)
            was_read = was_read.reshape(rows, 1, count, *extra, 1)
            level = against.reshape(rows, kv_heads, 1, *extra, n)
            weight = jnp.exp2(jnp.where(was_read, logits[..., :n], -jnp.inf) - level)
            return jnp.sum(jnp.where(was_read, weight, 0.0), axis=-1)

        mass = (
            received(shares["page_lse"], past, columns[0]),
            received(shares["logits"], recent, columns[1]),
        )
    return by_query(out).astype(q.dtype), by_query(both * LN2), mass
