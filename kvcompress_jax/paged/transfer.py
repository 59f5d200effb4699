"""Whole pages off the device and back, bit for bit: for preemption and colder tiers."""

import dataclasses

import jax
import jax.numpy as jnp

from kvcompress_jax.codec import Scale
from kvcompress_jax.paged.cache import PagedCache
from kvcompress_jax.paged.host_arrays import HostArray


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PageIds:
    """Where pages are on the device; -1 is nowhere."""

    raw: HostArray  # i32[n] raw pages
    sealed: HostArray  # i32[m] sealed pages
    chunks: HostArray  # i32[m, layers] their fine chunks, -1 for none
    sink: HostArray  # i32[m] their slots of exact first tokens, -1 for none


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RawImage:
    """What n raw pages hold."""

    kv: jax.Array  # [n, layers, 2, heads, page_size, dim]
    mass: jax.Array  # f32[n, layers, heads, page_size]
    seen: jax.Array  # f32[n, layers, page_size]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SealedImage:
    """What m sealed pages hold; without a chunk or sink slot `fine` or `sinks` mean nothing."""

    base: jax.Array  # u8[m, layers, 2, heads, page_size * dim/2], or rows
    key_scale: Scale  # [m, layers, heads, dim]
    value_scale: Scale  # [m, layers, heads, page_size]
    order: jax.Array  # u8[m, layers, heads, page_size]
    refined: jax.Array  # u8[m, layers, heads, refined_tokens, 2, refined_bytes]
    first: jax.Array  # i32[m]
    heat: jax.Array  # f32[m]
    fine: jax.Array  # u8[m, layers, 2, heads, fine_rows * dim/2]
    sinks: jax.Array  # [m, layers, 2, heads, sink_tokens, dim]


def _pick(pool: jax.Array, index: jax.Array) -> jax.Array:
    if pool.shape[1] == 0:  # nothing is ever stored there
        return jnp.zeros((index.shape[0], pool.shape[0], *pool.shape[2:]), pool.dtype)
    return jnp.moveaxis(pool[:, jnp.maximum(index, 0)], 1, 0)


def _put(pool: jax.Array, index: jax.Array, x: jax.Array) -> jax.Array:
    if pool.shape[1] == 0:  # nothing is ever stored there
        return pool
    index = jnp.where(index < 0, pool.shape[1], index)  # too large: dropped
    return pool.at[:, index].set(jnp.moveaxis(x, 0, 1), mode="drop")


def export_raw(cache: PagedCache, raw: jax.Array) -> RawImage:
    """Copies raw pages i32[n] out of the pools; ids of -1 give pages that mean nothing."""
    return RawImage(
        kv=_pick(cache.raw, raw), mass=_pick(cache.mass, raw), seen=_pick(cache.seen, raw)
    )


def import_raw(cache: PagedCache, raw: jax.Array, image: RawImage) -> PagedCache:
    """Writes raw pages i32[n]; ids of -1 are skipped. `cache` is donated."""
    return dataclasses.replace(
        cache,
        raw=_put(cache.raw, raw, image.kv),
        mass=_put(cache.mass, raw, image.mass),
        seen=_put(cache.seen, raw, image.seen),
    )


def export_pages(cache: PagedCache, ids: PageIds) -> tuple[RawImage, SealedImage]:
    """Copies pages out of the pools; ids of -1 give pages that mean nothing."""

    if cache.fine.shape[0]:
        fine = cache.fine[jnp.maximum(ids.chunks, 0)]
    else:
        fine = jnp.zeros((*ids.chunks.shape, *cache.fine.shape[1:]), cache.fine.dtype)
    sealed = SealedImage(
        base=_pick(cache.base, ids.sealed),
        key_scale=jax.tree.map(lambda pool: _pick(pool, ids.sealed), cache.key_scale),
        value_scale=jax.tree.map(lambda pool: _pick(pool, ids.sealed), cache.value_scale),
        order=_pick(cache.order, ids.sealed),
        refined=_pick(cache.refined, ids.sealed),
        first=_pick(cache.first[None], ids.sealed)[:, 0],
        heat=_pick(cache.heat[None], ids.sealed)[:, 0],
        fine=fine,
        sinks=_pick(cache.sinks, ids.sink),
    )
    return export_raw(cache, ids.raw), sealed


def import_pages(cache: PagedCache, ids: PageIds, raw: RawImage, sealed: SealedImage) -> PagedCache:
    """Writes pages back, to the same or other ids; ids of -1 are skipped. `cache` is donated."""

    def put_sealed(pool: jax.Array, x: jax.Array) -> jax.Array:
        return _put(pool, ids.sealed, x)

    fine = cache.fine
    if fine.shape[0]:
        chunk = jnp.where(ids.chunks < 0, fine.shape[0], ids.chunks)
        fine = fine.at[chunk].set(sealed.fine, mode="drop")
    page = jnp.where(ids.sealed < 0, cache.base.shape[1], ids.sealed)
    return dataclasses.replace(
        import_raw(cache, ids.raw, raw),
        base=put_sealed(cache.base, sealed.base),
        key_scale=jax.tree.map(put_sealed, cache.key_scale, sealed.key_scale),
        value_scale=jax.tree.map(put_sealed, cache.value_scale, sealed.value_scale),
        order=put_sealed(cache.order, sealed.order),
        refined=put_sealed(cache.refined, sealed.refined),
        first=put_sealed(cache.first[None], sealed.first[:, None])[0],
        heat=cache.heat.at[page].set(sealed.heat, mode="drop"),
        sealed=cache.sealed.at[page].set(True, mode="drop"),
        fine=fine,
        fine_of=cache.fine_of.at[:, page].set(ids.chunks.T, mode="drop"),
        sinks=_put(cache.sinks, ids.sink, sealed.sinks),
    )
