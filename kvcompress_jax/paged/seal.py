"""Full raw pages to sealed ones."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import lax

from kvcompress_jax.codec import Scale
from kvcompress_jax.paged.cache import PagedCache
from kvcompress_jax.paged.host_arrays import HostArray
from kvcompress_jax.paged.page_code import PageCode, encode_page
from kvcompress_jax.paged.telemetry import keep_shadow


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Sealing:
    """Pages to seal; the first `count` entries are real, the rest is padding."""

    raw: HostArray  # i32[n] raw page, full
    page: HostArray  # i32[n] sealed page to write
    chunks: HostArray  # i32[n, layers] fine chunk of each layer, -1: that layer goes to level 2
    sink: HostArray  # i32[n] slot for the exact first tokens, -1: not the first page of a sequence
    count: HostArray  # i32[]
    shadow: HostArray | None = None  # i32[n] where telemetry keeps the raw page, -1: nowhere


def seal(cache: PagedCache, sealing: Sealing) -> PagedCache:
    """Codes raw pages into sealed ones; the raw pages stay as they are, for the host to free.

    A page with a value that is not finite in any layer is not sealed: nothing of it is written,
    `cache.sealed` is False for its target and `cache.rejected` counts it. Other pages are not
    affected.

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
        finite = jnp.all(jnp.isfinite(kv))
        if layout.statistics:
            mass, seen = cache.mass[:, raw], cache.seen[:, raw]
        else:
            mass = jnp.zeros((layout.layers, layout.kv_heads, layout.page_size), jnp.float32)
            seen = jnp.zeros((layout.layers, layout.page_size), jnp.float32)
        exact = (token < layout.sink_tokens) & (sink >= 0)
        code = jax.vmap(encoder, in_axes=(0, 0, 0, 0, None, 0))(
            kv[:, 0], kv[:, 1], mass, seen, exact, cache.learned
        )
        if cache.telemetry is not None and sealing.shadow is not None:
            kept = keep_shadow(cache.telemetry, kv, sealing.shadow[i])
            cache = dataclasses.replace(cache, telemetry=kept)
        return _store(cache, code, kv, sealing, i, finite)

    return lax.fori_loop(0, sealing.count, body, cache)


def _store(
    cache: PagedCache,
    code: PageCode,
    kv: jax.Array,
    sealing: Sealing,
    i: jax.Array,
    finite: jax.Array,
) -> PagedCache:
    """Writes one page's code, or nothing of it: indices out of range are dropped."""
    page = jnp.where(finite, sealing.page[i], cache.base.shape[1])
    chunks = sealing.chunks[i]
    refined = finite & (chunks >= 0)
    chunk = jnp.where(refined, chunks, cache.fine.shape[0])
    sink = jnp.where(finite & (sealing.sink[i] >= 0), sealing.sink[i], cache.sinks.shape[1])

    def put(pool: jax.Array, index: jax.Array, x: jax.Array) -> jax.Array:
        if pool.shape[1] == 0:  # a cache without sinks
            return pool
        return pool.at[:, index].set(x.astype(pool.dtype), mode="drop")

    def put_scale(pool: Scale, x: Scale) -> Scale:
        return Scale(step=put(pool.step, page, x.step), zero=put(pool.zero, page, x.zero))

    return dataclasses.replace(
        cache,
        base=put(cache.base, page, code.base),
        key_scale=put_scale(cache.key_scale, code.key_scale),
        value_scale=put_scale(cache.value_scale, code.value_scale),
        order=put(cache.order, page, code.order),
        fine=cache.fine.at[chunk].set(code.fine, mode="drop")
        if cache.fine.shape[0]
        else cache.fine,
        fine_of=put(cache.fine_of, page, jnp.where(refined, chunks, -1)),
        sinks=put(cache.sinks, sink, kv[:, :, :, : cache.layout.sink_tokens]),
        sealed=cache.sealed.at[sealing.page[i]].set(finite),  # its last owner may have left True
        heat=cache.heat.at[page].set(0.0, mode="drop"),
        rejected=cache.rejected + jnp.where(finite, 0, 1),
    )
