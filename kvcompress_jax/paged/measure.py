"""Attention to shadowed pages, raw and coded, into the sums of `Telemetry`."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import lax

from kvcompress_jax.paged.cache import PagedCache
from kvcompress_jax.paged.heads import gather_heads
from kvcompress_jax.paged.host_arrays import HostArray
from kvcompress_jax.paged.read import decode_pages, slot_tokens
from kvcompress_jax.paged.table import PageTable
from kvcompress_jax.paged.telemetry import ErrorSums

_einsum = functools.partial(
    jnp.einsum, precision=lax.Precision.HIGHEST, preferred_element_type=jnp.float32
)


def measure(
    cache: PagedCache,
    layer: jax.Array | int,
    q: jax.Array,
    table: PageTable,
    pages: HostArray,
    out: jax.Array,
    lse: jax.Array,
    *,
    query_lengths: jax.Array,
    scale: float,
    window: jax.Array | int | None,
    soft_cap: float | None,
) -> PagedCache:
    """Adds the samples of one `attend` call; queries that see no shadowed page are none.

    With D the change of a query's output when all shadowed pages that it sees are taken raw, its
    error is |D| * sqrt(seen / shadowed) / |output + D|: exact when all compressed pages that it
    sees have shadows, else an estimate, as if the pages' errors were independent and the shadowed
    ones a fair sample.

    Args:
      cache: with telemetry; the shadows of sealed pages.
      layer: i32[].
      q: [rows, queries, all_heads, dim], as `attend` got it.
      table: as `attend` got it.
      pages: i32[shadow_pages] the sealed page that each shadow is of, -1: of none.
      out: what `attend` returned.
      lse: what `attend` returned.
      query_lengths: as `attend` got it.
      scale: as `attend` got it.
      window: as `attend` got it.
      soft_cap: as `attend` got it.
    """
    telemetry, layout = cache.telemetry, cache.layout
    if telemetry is None:
        raise ValueError("cache: expected one with telemetry, got None")
    rows, queries, _, dim = q.shape
    heads, size = layout.kv_heads, layout.page_size
    pages = jnp.asarray(pages)
    ids = jnp.maximum(pages, 0)

    column = jnp.arange(table.sealed.shape[1], dtype=jnp.int32)
    live = column[None, :] < table.sealed_count[:, None]  # [rows, columns]
    same = (table.sealed[:, None, :] == ids[None, :, None]) & live[:, None, :]
    same = same & (pages >= 0)[None, :, None]  # [rows, shadows, columns]
    held = jnp.any(same, axis=2)  # [rows, shadows]
    index = jnp.sum(jnp.where(same, table.sealed_index[:, None, :], 0), axis=2)

    position = (table.length - query_lengths)[:, None] + jnp.arange(queries, dtype=jnp.int32)[None]
    reach = jnp.full((), -1, jnp.int32) if window is None else jnp.asarray(window, jnp.int32)
    # The first position that a query sees; [rows, queries].
    oldest = jnp.where(reach > 0, position - reach + 1, 0)

    def tokens(order: jax.Array) -> jax.Array:  # i32[shadows, heads, size], to [rows, ...]
        return index[:, :, None, None] * size + order[None]

    def visible(token: jax.Array) -> jax.Array:
        """bool[rows, queries, heads, shadows, size]: tokens whose code is what is attended to."""
        exact = (table.sink >= 0)[:, None, None, None] & (token < layout.sink_tokens)
        coded = held[:, :, None, None] & ~exact
        inside = token.swapaxes(1, 2)[:, None] >= oldest[:, :, None, None, None]
        return coded.swapaxes(1, 2)[:, None] & inside

    grouped = q.astype(jnp.float32).reshape(rows, queries, heads, -1, dim) * scale
    level = lse.reshape(rows, queries, heads, -1)
    real = jnp.isfinite(level)
    level = jnp.where(real, level, 0.0)

    def weigh(keys: jax.Array, values: jax.Array, order: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Share of the softmax that the pages get, in units of the whole, and what it brings."""
        logits = _einsum("rqhgd,shtd->rqhgst", grouped, keys)
        if soft_cap is not None:
            logits = soft_cap * jnp.tanh(logits / soft_cap)
        mask = visible(tokens(order))[:, :, :, None] & real[..., None, None]
        weights = jnp.where(mask, jnp.exp(logits - level[..., None, None]), 0.0)
        return jnp.sum(weights, axis=(4, 5)), _einsum("rqhgst,shtd->rqhgd", weights, values)

    in_order = jnp.broadcast_to(
        jnp.arange(size, dtype=jnp.int32)[None, None, :], (ids.shape[0], heads, size)
    )
    raw = telemetry.shadow[layer].astype(jnp.float32)
    known = (pages >= 0)[:, None, None, None, None]
    raw = jnp.where(known, raw, 0.0)  # what was never written may hold NaN, and 0 * NaN is NaN
    raw_share, raw_part = weigh(raw[:, 0], raw[:, 1], in_order)
    coded = decode_pages(cache, layer, ids, pages >= 0)
    coded_share, coded_part = weigh(*coded, slot_tokens(cache, layer, ids))

    # An old page that a window hides from a query counts neither as seen nor as shadowed.
    def count(ends: jax.Array, there: jax.Array) -> jax.Array:  # [rows, pages] to [rows, queries]
        inside = (ends[:, None] + 1) * size > oldest[:, :, None]
        return jnp.sum(inside & there[:, None], axis=2).astype(jnp.float32)

    shadowed = count(index, held)
    share = count(table.sealed_index, live) / jnp.maximum(shadowed, 1.0)
    taken = real & (shadowed > 0)[:, :, None, None]

    output = out.astype(jnp.float32).reshape(rows, queries, heads, -1, dim)
    total = 1.0 + raw_share - coded_share  # softmax of the whole, with the pages raw
    total = jnp.where(taken, jnp.maximum(total, jnp.finfo(jnp.float32).tiny), 1.0)
    change = raw_part - coded_part - output * (raw_share - coded_share)[..., None]
    change = change / total[..., None]
    scaled = jnp.linalg.norm(change, axis=-1) * jnp.sqrt(share)[:, :, None, None]
    norm = jnp.linalg.norm(output + change, axis=-1)
    error = jnp.where(taken & (norm > 0), scaled / jnp.where(norm > 0, norm, 1.0), 0.0)
    lse_error = jnp.abs(jnp.log(total)) * jnp.sqrt(share)[:, :, None, None]
    lse_error = jnp.where(taken, lse_error, 0.0)
    taken, error, lse_error = (gather_heads(cache.split, x, 2) for x in (taken, error, lse_error))
    old = telemetry.sums
    sums = ErrorSums(
        samples=old.samples.at[layer].add(jnp.sum(taken).astype(jnp.float32)),
        output=old.output.at[layer].add(jnp.sum(error)),
        output_squares=old.output_squares.at[layer].add(jnp.sum(error**2)),
        output_max=old.output_max.at[layer].max(jnp.max(error)),
        lse=old.lse.at[layer].add(jnp.sum(lse_error)),
        lse_max=old.lse_max.at[layer].max(jnp.max(lse_error)),
    )
    return dataclasses.replace(cache, telemetry=dataclasses.replace(telemetry, sums=sums))
