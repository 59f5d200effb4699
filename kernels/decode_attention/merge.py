"""Shares of the attention of a sequence into one, in plain JAX, and what pages received."""

from collections.abc import Mapping

import jax
import jax.numpy as jnp

from kvcompress_jax.kernels.decode_attention.inputs import LN2, Groups, PageLists
from kvcompress_jax.kernels.decode_attention.queries import Listed, untile_queries


def merge(
    out: jax.Array, lse: jax.Array, q: jax.Array, *, query_lengths: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Output and log-sum-exp of `decode_attention`.

    Args:
      out: f32[rows, kv_heads, splits, dim, columns], columns being queries times query heads of a
        KV head, or more.
      lse: f32[rows, kv_heads, splits, columns], of base 2; very negative where nothing was seen.
      q: the queries, for their shape and dtype.
      query_lengths: i32[rows].
    """
    queries, all_heads = q.shape[1:3]
    group = all_heads // lse.shape[1]
    n = queries * group
    real = jnp.arange(queries, dtype=jnp.int32)[None, :] < query_lengths[:, None]
    real = jnp.repeat(real, group, axis=1)[:, None, :]  # [rows, 1, n]
    lse = lse[..., :n]
    top = jnp.max(lse, axis=2)
    weight = jnp.exp2(lse - top[:, :, None])
    weight = jnp.where(lse < -1e29, 0.0, weight)
    total = jnp.sum(weight, axis=2)
    some = real & (total != 0)  # NaN is handed on
    total = jnp.where(some, total, 1.0)
    merged = jnp.sum(out[..., :n] * weight[:, :, :, None, :], axis=2) / total[:, :, None]
    merged = jnp.where(some[:, :, None], merged, 0.0)  # [rows, kv_heads, dim, n]
    both = jnp.where(some, (top + jnp.log2(total)) * LN2, -jnp.inf)

    merged = untile_queries(jnp.moveaxis(merged, -1, 2), queries)
    return merged.astype(q.dtype), untile_queries(both, queries)


def received_mass(
    shares: Mapping[str, jax.Array],
    lse: jax.Array,
    *,
    listed: Listed,
    lists: PageLists,
) -> tuple[jax.Array, jax.Array] | None:
    """What pages and raw tokens received, as `decode_attention` returns it; None: nobody asked.

    Args:
      shares: of a kernel that was asked for it, page_lse f32[rows, kv_heads, max_sealed, columns]
        and logits f32[rows, kv_heads, max_raw, page_size, columns], of base 2, where only pages
        that were read are written.
      lse: f32[rows, queries, heads], of all.
      listed: pages as they were read.
      lists: pages as they were given.
    """
    if "page_lse" not in shares:
        return None
    rows, queries, all_heads = lse.shape
    kv_heads = shares["page_lse"].shape[1]
    group = all_heads // kv_heads
    level = jnp.where(lse > -jnp.inf, lse / LN2, jnp.inf)
    level = level.reshape(rows, queries, kv_heads, group).swapaxes(1, 2)
    level = level.reshape(rows, kv_heads, queries * group)

    def received(logits: jax.Array, groups: Groups | None, count: int) -> jax.Array:
        """Summed over queries: from [rows, kv_heads, columns, ..., n]."""
        if groups is None or not count:
            return jnp.zeros((*logits.shape[:2], count, *logits.shape[3:-1]), jnp.float32)
        extra = (1,) * (logits.ndim - 4)
        read = groups.read.reshape(rows, 1, count, *extra, 1)
        against = level.reshape(rows, kv_heads, 1, *extra, queries * group)
        counts = read & (against < jnp.inf)
        weight = jnp.exp2(logits[..., : queries * group] - against)
        return jnp.sum(jnp.where(counts, weight, 0.0), axis=-1)

    return (
        received(shares["page_lse"], listed.past, lists.sealed.shape[1]),
        received(shares["logits"], listed.recent, lists.raw.shape[1]),
    )
