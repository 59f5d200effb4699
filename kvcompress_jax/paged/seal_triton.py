"""Full raw pages to sealed ones on a GPU: all of them by one launch of a kernel."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import lax

from kvcompress_jax.codec import Scale
from kvcompress_jax.feedback import at_position, block_pairs
from kvcompress_jax.kernels.pools import CodePools
from kvcompress_jax.kernels.seal_page.triton import seal_page_triton
from kvcompress_jax.paged.cache import PagedCache
from kvcompress_jax.paged.heads import head_by_head, on_all_heads
from kvcompress_jax.paged.page_code import FIT_AXES, fit_page
from kvcompress_jax.paged.sealing import Sealing
from kvcompress_jax.paged.telemetry import keep_shadow


def seal_triton(cache: PagedCache, sealing: Sealing, *, interpret: bool = False) -> PagedCache:
    """See `kvcompress_jax.paged.seal.seal`. What tokens are worth is found by XLA, page by page;
    the kernel does the rest. A page that is refused may have been written to in part.

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
    pools, sealed = seal_page_triton(
        cache.raw,
        CodePools(
            base=cache.base,
            fine=cache.fine,
            key_step=cache.key_scale.step,
            key_zero=cache.key_scale.zero,
            value_step=cache.value_scale.step,
            value_zero=cache.value_scale.zero,
            order=cache.order,
            fine_bits=layout.fine_bits,
        ),
        source=jnp.asarray(sealing.raw),
        target=jnp.asarray(sealing.page),
        chunks=jnp.asarray(sealing.chunks),
        count=jnp.asarray(sealing.count),
        exact=jnp.where(first, exact, 0).astype(jnp.int32),
        worth=_worth(cache, sealing, n),
        feedback=_feedback(cache, sealing),
        pairs=block_pairs(layout.head_dim),
        interpret=interpret,
    )
    sealed = on_all_heads(cache.split, sealed)
    # Indices out of range are dropped.
    page = jnp.where(sealed, sealing.page, cache.sealed.shape[0])
    sinks = cache.sinks
    if sinks.shape[1]:
        slot = jnp.where(sealed & first, sealing.sink, sinks.shape[1])
        rows = cache.raw[:, sealing.raw, :, :, : layout.sink_tokens]
        sinks = sinks.at[:, slot].set(rows, mode="drop")
    every_page = jnp.where(real, sealing.page, cache.sealed.shape[0])
    cache = dataclasses.replace(
        cache,
        base=pools.base,
        fine=pools.fine,
        key_scale=Scale(step=pools.key_step, zero=pools.key_zero),
        value_scale=Scale(step=pools.value_step, zero=pools.value_zero),
        order=pools.order,
        fine_of=cache.fine_of.at[:, page].set(jnp.asarray(sealing.chunks).T, mode="drop"),
        sinks=sinks,
        heat=cache.heat.at[page].set(0.0, mode="drop"),
        # The last owner of a page may have left True.
        sealed=cache.sealed.at[every_page].set(sealed, mode="drop"),
        rejected=cache.rejected + jnp.sum(real & ~sealed, dtype=jnp.int32),
    )
    return _keep_shadows(cache, sealing)


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
        keys, values = cache.raw[:, raw, 0], cache.raw[:, raw, 1]
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
        return keep_shadow(telemetry, cache.raw[:, sealing.raw[i]], shadow[i])  # type: ignore[arg-type]

    kept = lax.fori_loop(0, sealing.count, body, cache.telemetry)
    return dataclasses.replace(cache, telemetry=kept)
