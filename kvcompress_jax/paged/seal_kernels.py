"""Full raw pages to sealed ones, all of them by one call of a kernel."""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

from kvcompress_jax.codec import Scale
from kvcompress_jax.feedback import at_position, block_pairs
from kvcompress_jax.kernels.pools import CodePools
from kvcompress_jax.kernels.seal_page.cpu import seal_page_cpu
from kvcompress_jax.kernels.seal_page.triton import seal_page_triton
from kvcompress_jax.paged.cache import PagedCache, code_pools
from kvcompress_jax.paged.heads import head_by_head, on_all_heads
from kvcompress_jax.paged.page_code import FIT_AXES, fit_page
from kvcompress_jax.paged.raw_bits import bits, from_pool
from kvcompress_jax.paged.sealing import Sealing
from kvcompress_jax.paged.telemetry import keep_shadow

SealPage = Callable[..., tuple[CodePools, jax.Array]]


def seal_triton(cache: PagedCache, sealing: Sealing, *, interpret: bool = False) -> PagedCache:
    """On a GPU. A page that is refused may have been written to in part."""
    return _seal(cache, sealing, functools.partial(seal_page_triton, interpret=interpret))


def seal_cpu(cache: PagedCache, sealing: Sealing) -> PagedCache:
    """On a CPU."""
    return _seal(cache, sealing, seal_page_cpu)


def _seal(cache: PagedCache, sealing: Sealing, seal_page: SealPage) -> PagedCache:
    """See `kvcompress_jax.paged.seal.seal`. What tokens are worth is found by XLA, page by page;
    the kernel does the rest.

    Raises:
      NotImplementedError: a calibrated code, or shapes that the kernel cannot do.
    """
    layout = cache.layout
    if layout.rows is not None:
        raise NotImplementedError("expected a cache without a calibrated code, got one with")
    n = jnp.asarray(sealing.raw).shape[0]
    real = jnp.arange(n, dtype=jnp.int32) < sealing.count
    first = sealing.sink >= 0
    exact = layout.sink_tokens if cache.sinks.shape[1] else 0
    pools, sealed = seal_page(
        cache.raw,
        code_pools(cache),
        source=jnp.asarray(sealing.raw),
        target=jnp.asarray(sealing.page),
        chunks=jnp.asarray(sealing.chunks),
        count=jnp.asarray(sealing.count),
        exact=jnp.where(first, exact, 0).astype(jnp.int32),
        worth=_worth(cache, sealing, n),
        feedback=_feedback(cache, sealing),
        pairs=block_pairs(layout.head_dim),
    )
    sealed = on_all_heads(cache.split, sealed)
    # Indices out of range are dropped.
    page = jnp.where(sealed, sealing.page, cache.sealed.shape[0])
    every_page = jnp.where(real, sealing.page, cache.sealed.shape[0])
    cache = dataclasses.replace(
        cache,
        base=pools.base,
        fine=pools.fine,
        key_scale=Scale(step=pools.key_step, zero=pools.key_zero),
        value_scale=Scale(step=pools.value_step, zero=pools.value_zero),
        order=pools.order,
        fine_of=cache.fine_of.at[:, page].set(jnp.asarray(sealing.chunks).T, mode="drop"),
        sinks=_put_sinks(cache, sealing, sealed & first),
        heat=cache.heat.at[page].set(0.0, mode="drop"),
        # The last owner of a page may have left True.
        sealed=cache.sealed.at[every_page].set(sealed, mode="drop"),
        rejected=cache.rejected + jnp.sum(real & ~sealed, dtype=jnp.int32),
    )
    return _keep_shadows(cache, sealing)


def _put_sinks(cache: PagedCache, sealing: Sealing, first: jax.Array) -> jax.Array:
    """The exact first tokens of pages that are `first`, bool[n]. In slices: JAX before 0.12 gathers
    bfloat16 by way of all of its pool in float32."""
    sinks = cache.sinks
    if not sinks.shape[1]:
        return sinks
    layers, _, _, heads, tokens, dim = sinks.shape

    def body(i: jax.Array, sinks: jax.Array) -> jax.Array:
        start = (0, sealing.raw[i], 0, 0, 0, 0)
        rows = lax.dynamic_slice(cache.raw, start, (layers, 1, 2, heads, tokens, dim))
        slot = jnp.maximum(sealing.sink[i], 0)
        there = lax.dynamic_slice_in_dim(sinks, slot, 1, axis=1)
        rows = jnp.where(first[i], from_pool(rows, sinks.dtype), there)
        return lax.dynamic_update_slice_in_dim(sinks, rows, slot, axis=1)

    return lax.fori_loop(0, sealing.count, body, sinks)


def _feedback(cache: PagedCache, sealing: Sealing) -> jax.Array | None:
    """f32[n, layers, heads, 2, rank, dim], as `seal_page` has it."""
    if cache.feedback is None:
        return None
    page = jax.vmap(functools.partial(at_position, cache.feedback))(jnp.asarray(sealing.first))
    both = jnp.stack([page.carry, page.answer], axis=3)  # [n, layers, heads, 2, 2, dim/2, rank]
    both = jnp.moveaxis(both, -1, 4)
    return both.reshape(*both.shape[:5], cache.layout.head_dim)


def _worth(cache: PagedCache, sealing: Sealing, n: int) -> jax.Array | None:
    """f32[n, layers, heads, page_size], or None where no token has more bits than another."""
    layout = cache.layout
    refined = layout.refined_slots if cache.fine.shape[0] else 0
    if not 0 < refined < layout.page_size:
        return None
    fit = functools.partial(fit_page, rule=layout.importance, refined=refined)
    fit_layers = jax.vmap(fit, in_axes=(0, 0, 0, 0, None, 0))
    token = jnp.arange(layout.page_size, dtype=jnp.int32)
    shape = (layout.layers, layout.kv_heads, layout.page_size)

    def body(i: jax.Array, worth: jax.Array) -> jax.Array:
        raw = sealing.raw[i]
        mass, seen = jnp.zeros(shape), jnp.zeros((layout.layers, layout.page_size))
        if layout.statistics:
            mass, seen = cache.mass[:, raw], cache.seen[:, raw]
        exact = None
        if layout.sink_tokens and cache.sinks.shape[1]:
            exact = (token < layout.sink_tokens) & (sealing.sink[i] >= 0)
        kv = from_pool(bits(cache.raw)[:, raw], layout.jax_dtype)
        keys, values = kv[:, 0], kv[:, 1]
        found = head_by_head(
            cache.split,
            fit_layers,
            *(keys, values, mass, seen, exact, cache.learned),
            axes=FIT_AXES,
            out_axis=1,
        ).worth
        return worth.at[i].set(found)

    return lax.fori_loop(0, sealing.count, body, jnp.zeros((n, *shape)))


def _keep_shadows(cache: PagedCache, sealing: Sealing) -> PagedCache:
    if cache.telemetry is None or sealing.shadow is None:
        return cache
    shadow = sealing.shadow

    def body(i: jax.Array, telemetry: object) -> object:
        kv = from_pool(bits(cache.raw)[:, sealing.raw[i]], cache.layout.jax_dtype)
        return keep_shadow(telemetry, kv, shadow[i])  # type: ignore[arg-type]

    kept = lax.fori_loop(0, sealing.count, body, cache.telemetry)
    return dataclasses.replace(cache, telemetry=kept)
