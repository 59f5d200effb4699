"""Full raw pages to sealed ones."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import lax

from kvcompress_jax.calibrated.code import LARGEST
from kvcompress_jax.paged.cache import PagedCache
from kvcompress_jax.paged.host_arrays import HostArray
from kvcompress_jax.paged.page_code import PageCode, encode_page
from kvcompress_jax.paged.seal_rows import seal_rows
from kvcompress_jax.paged.telemetry import keep_shadow


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Sealing:
    """Pages to seal; the first `count` entries are real, the rest is padding."""

    raw: HostArray  # i32[n] raw page, full
    page: HostArray  # i32[n] sealed page to write
    chunks: HostArray  # i32[n, layers] fine chunk of each layer, -1: that layer goes to level 2
    first: HostArray  # i32[n] position of the page's first token
    sink: HostArray  # i32[n] slot for the exact first tokens, -1: not the first page of a sequence
    count: HostArray  # i32[]
    shadow: HostArray | None = None  # i32[n] where telemetry keeps the raw page, -1: nowhere


def seal(cache: PagedCache, sealing: Sealing) -> PagedCache:
    """Codes raw pages into sealed ones; the raw pages stay as they are, for the host to free.

    A page with a value that is not finite in any layer, or too large for the calibrated code, is
    not sealed: nothing of it is written, `cache.sealed` is False for its target and
    `cache.rejected` counts it. Other pages are not affected.

    Args:
      cache: donated, it is updated in place.
      sealing: what to seal.

    Returns:
      The cache with the codes in it, `cache.sealed` True for pages that were sealed.
    """
    layout = cache.layout
    token = jnp.arange(layout.page_size, dtype=jnp.int32)
    encoder = functools.partial(encode_page, rule=layout.importance, fine_rows=layout.fine_rows)

    def body(i: jax.Array, cache: PagedCache) -> PagedCache:
        raw, sink = sealing.raw[i], sealing.sink[i]
        kv = cache.raw[:, raw]  # [layers, 2, heads, page_size, dim]
        if layout.rows is None:
            finite = jnp.all(jnp.isfinite(kv))
        else:
            finite = jnp.all(jnp.abs(kv.astype(jnp.float32)) <= LARGEST)  # False for NaN
        if layout.statistics:
            mass, seen = cache.mass[:, raw], cache.seen[:, raw]
        else:
            mass = jnp.zeros((layout.layers, layout.kv_heads, layout.page_size), jnp.float32)
            seen = jnp.zeros((layout.layers, layout.page_size), jnp.float32)
        exact = (token < layout.sink_tokens) & (sink >= 0)
        page = jnp.where(finite, sealing.page[i], cache.base.shape[1])
        if cache.code is not None and layout.rows is not None:
            first = sealing.first[i]
            cache = seal_rows(cache, cache.code, layout.rows, kv, (mass, seen), exact, first, page)
        else:
            code = jax.vmap(encoder, in_axes=(0, 0, 0, 0, None, 0))(
                kv[:, 0], kv[:, 1], mass, seen, exact, cache.learned
            )
            cache = _store_planes(cache, code, page, jnp.where(finite, sealing.chunks[i], -1))
        if cache.telemetry is not None and sealing.shadow is not None:
            kept = keep_shadow(cache.telemetry, kv, sealing.shadow[i])
            cache = dataclasses.replace(cache, telemetry=kept)
        return _finish(cache, kv, sealing, i, finite)

    return lax.fori_loop(0, sealing.count, body, cache)


def _store_planes(
    cache: PagedCache, code: PageCode, page: jax.Array, chunks: jax.Array
) -> PagedCache:
    """Writes one page's code; a page or chunk that is out of range is dropped.

    Args:
      cache: updated in place under donation.
      code: of all layers.
      page: i32[].
      chunks: i32[layers], -1 for layers that go to level 2.
    """

    def put(pool: jax.Array, x: jax.Array) -> jax.Array:
        return pool.at[:, page].set(x, mode="drop")

    fine = cache.fine
    if fine.shape[0]:
        fine = fine.at[jnp.where(chunks < 0, fine.shape[0], chunks)].set(code.fine, mode="drop")
    return dataclasses.replace(
        cache,
        base=put(cache.base, code.base),
        key_scale=jax.tree.map(put, cache.key_scale, code.key_scale),
        value_scale=jax.tree.map(put, cache.value_scale, code.value_scale),
        order=put(cache.order, code.order),
        fine=fine,
        fine_of=put(cache.fine_of, chunks),
    )


def _finish(
    cache: PagedCache, kv: jax.Array, sealing: Sealing, i: jax.Array, finite: jax.Array
) -> PagedCache:
    """Writes the exact first tokens, and that the page is sealed or was rejected."""
    sinks = cache.sinks
    if sinks.shape[1]:
        slot = jnp.where(finite & (sealing.sink[i] >= 0), sealing.sink[i], sinks.shape[1])
        exact = kv[:, :, :, : cache.layout.sink_tokens]
        sinks = sinks.at[:, slot].set(exact, mode="drop")
    page = jnp.where(finite, sealing.page[i], cache.base.shape[1])
    return dataclasses.replace(
        cache,
        sinks=sinks,
        sealed=cache.sealed.at[sealing.page[i]].set(finite),  # its last owner may have left True
        heat=cache.heat.at[page].set(0.0, mode="drop"),
        rejected=cache.rejected + jnp.where(finite, 0, 1),
    )
