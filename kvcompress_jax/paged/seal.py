"""Full raw pages to sealed ones."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jax import lax

from kvcompress_jax.calibrated.code import LARGEST
from kvcompress_jax.codec import all_finite
from kvcompress_jax.feedback import HEAD_AXIS, at_position
from kvcompress_jax.kernels.dispatch import dispatch
from kvcompress_jax.paged.cache import PagedCache
from kvcompress_jax.paged.heads import head_by_head, on_all_heads
from kvcompress_jax.paged.page_code import (
    FIT_AXES,
    PageParts,
    code_rows,
    fit_page,
    lay_out,
)
from kvcompress_jax.paged.plane_bytes import flat
from kvcompress_jax.paged.raw_bits import bits, from_pool
from kvcompress_jax.paged.seal_kernels import seal_cpu, seal_triton
from kvcompress_jax.paged.seal_rows import seal_rows
from kvcompress_jax.paged.sealing import Sealing
from kvcompress_jax.paged.telemetry import keep_shadow

_Tree = TypeVar("_Tree")


def seal(cache: PagedCache, sealing: Sealing, *, implementation: str | None = None) -> PagedCache:
    """Codes raw pages into sealed ones; the raw pages stay as they are, for the host to free.

    A page with a value that is not finite in any layer, or too large for the calibrated code, is
    not sealed: nothing of it is written, `cache.sealed` is False for its target and
    `cache.rejected` counts it. Other pages are not affected.

    Args:
      cache: donated, it is updated in place.
      sealing: what to seal.
      implementation: "triton", a kernel for GPUs, "cpu", one for CPUs, or "xla"; None chooses
        the first that can. On a GPU a refused page may have been written to in part, which means
        nothing: it is not sealed.

    Returns:
      The cache with the codes in it, `cache.sealed` True for pages that were sealed.

    Raises:
      ValueError: an implementation that does not exist.
      NotImplementedError: the implementation that was named cannot do this here.
    """
    return dispatch("seal", IMPLEMENTATIONS, implementation, cache, sealing)


def seal_xla(cache: PagedCache, sealing: Sealing) -> PagedCache:
    """See `seal`: page after page, on any device."""
    layout = cache.layout
    # Where no page can have a fine chunk, none is coded, and the tokens need no order.
    fine_rows = layout.fine_rows if cache.fine.shape[0] else 0
    refined = layout.refined_slots if fine_rows else 0
    fit_layers = jax.vmap(
        functools.partial(fit_page, rule=layout.importance, refined=refined),
        in_axes=(0, 0, 0, 0, None, 0),
    )
    code_layers = jax.vmap(
        functools.partial(code_rows, fine_rows=fine_rows, fine_bits=layout.fine_bits)
    )
    # Where the heads are in its arguments, with layers before them.
    code_axes = (1, 1, 1, HEAD_AXIS, None)
    lay_out_layers = jax.vmap(
        functools.partial(lay_out, fine_rows=fine_rows, fine_bits=layout.fine_bits)
    )
    token = jnp.arange(layout.page_size, dtype=jnp.int32)

    def body(i: jax.Array, cache: PagedCache) -> PagedCache:
        # Tied to i: what does not depend on it leaves the loop, and would be a copy of the pool.
        pool, i = lax.optimization_barrier((cache.raw, i))
        raw = sealing.raw[i]
        kv = from_pool(bits(pool)[:, raw], layout.jax_dtype)  # [layers, 2, heads, page_size, dim]
        if layout.statistics:
            mass, seen = cache.mass[:, raw], cache.seen[:, raw]
        else:
            mass = jnp.zeros((layout.layers, layout.kv_heads, layout.page_size), jnp.float32)
            seen = jnp.zeros((layout.layers, layout.page_size), jnp.float32)
        exact = None
        if layout.sink_tokens and cache.sinks.shape[1]:
            exact = (token < layout.sink_tokens) & (sealing.sink[i] >= 0)
        if cache.code is not None and layout.rows is not None:
            sound = jnp.all(jnp.abs(kv.astype(jnp.float32)) <= LARGEST)  # False for NaN
            finite = on_all_heads(cache.split, sound)
            write = functools.partial(
                seal_rows,
                code=cache.code,
                rows=layout.rows,
                kv=kv,
                attention=(mass, seen),
                exact=jnp.zeros(token.shape, bool) if exact is None else exact,
                first=sealing.first[i],
                page=sealing.page[i],
            )
        else:

            def read(pool: jax.Array, raw: jax.Array = raw) -> list[jax.Array]:
                halves = (from_pool(bits(pool)[:, raw, j], layout.jax_dtype) for j in (0, 1))
                return [x.astype(jnp.float32) for x in halves]  # bfloat16 is slower on CPUs

            finite = on_all_heads(cache.split, all_finite(kv))
            keys, values = _in_memory(finite, read, pool)
            fit = head_by_head(
                cache.split,
                fit_layers,
                *(keys, values, mass, seen, exact, cache.learned),
                axes=FIT_AXES,
                out_axis=1,
            )
            refines = jnp.asarray(sealing.chunks)[i] >= 0
            if cache.feedback is None:
                rows = _in_memory(finite, code_layers, keys, values, fit, None, refines)
            else:
                code = functools.partial(
                    head_by_head, cache.split, code_layers, axes=code_axes, out_axis=1
                )
                feedback = at_position(cache.feedback, sealing.first[i])
                rows = _in_memory(finite, code, keys, values, fit, feedback, refines)
            parts = _in_memory(finite, lay_out_layers, rows, fit)
            write = functools.partial(
                _store_planes,
                code=parts,
                page=sealing.page[i],
                chunks=sealing.chunks[i],
            )
        cache = lax.cond(
            finite, lambda cache: _finish(write(cache), kv, sealing, i), lambda cache: cache, cache
        )
        if cache.telemetry is not None and sealing.shadow is not None:
            kept = keep_shadow(cache.telemetry, kv, sealing.shadow[i])
            cache = dataclasses.replace(cache, telemetry=kept)
        # The last owner of the page may have left True.
        return dataclasses.replace(
            cache,
            sealed=cache.sealed.at[sealing.page[i]].set(finite),
            rejected=cache.rejected + jnp.where(finite, 0, 1),
        )

    return lax.fori_loop(0, sealing.count, body, cache)


def _in_memory(needed: jax.Array, work: Callable[..., _Tree], *args: Any) -> _Tree:
    """`work(*args)`, or zeros where it is not needed; in memory before anything reads it.

    XLA fuses nothing across the borders of a condition. It would else read the raw page, compute
    the order of the tokens, and find the code of a number, once more for everyone who wants it.
    """

    def nothing(*args: Any) -> _Tree:
        like = jax.eval_shape(work, *args)
        return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), like)

    return lax.cond(needed, work, nothing, *args)


def _store_planes(
    cache: PagedCache,
    *,
    code: PageParts,
    page: jax.Array,
    chunks: jax.Array,
) -> PagedCache:
    """Writes one page's code.

    Slices are updated, not scattered to: on JAX 0.10, XLA scatters bfloat16 on CPUs by way of a
    float32 copy of the whole pool.

    Args:
      cache: updated in place under donation.
      code: of all layers.
      page: i32[].
      chunks: i32[layers], -1 for layers that go to level 2.
    """

    def put(pool: jax.Array, x: jax.Array) -> jax.Array:
        return lax.dynamic_update_slice_in_dim(pool, x[:, None], page, axis=1)

    base, fine = cache.base, cache.fine
    for i, half in enumerate(code.base):
        base = lax.dynamic_update_slice(base, flat(half)[:, None, None], (0, page, i, 0, 0))
    if fine.shape[0]:  # indices out of range are dropped
        chunk = jnp.where(chunks >= 0, chunks, fine.shape[0])
        for i, half in enumerate(code.fine):
            fine = fine.at[chunk, i].set(flat(half), mode="drop")
    return dataclasses.replace(
        cache,
        base=base,
        key_scale=jax.tree.map(put, cache.key_scale, code.key_scale),
        value_scale=jax.tree.map(put, cache.value_scale, code.value_scale),
        order=put(cache.order, code.order),
        fine=fine,
        fine_of=put(cache.fine_of, chunks),
    )


def _finish(cache: PagedCache, kv: jax.Array, sealing: Sealing, i: jax.Array) -> PagedCache:
    """Writes what every sealed page has: the exact first tokens, and no heat yet."""
    sinks, sink = cache.sinks, sealing.sink[i]
    if sinks.shape[1]:  # indices out of range are dropped
        slot = jnp.where(sink >= 0, sink, sinks.shape[1])
        exact = kv[:, :, :, : cache.layout.sink_tokens]
        sinks = sinks.at[:, slot].set(exact, mode="drop")
    return dataclasses.replace(cache, sinks=sinks, heat=cache.heat.at[sealing.page[i]].set(0.0))


IMPLEMENTATIONS = {"triton": seal_triton, "cpu": seal_cpu, "xla": seal_xla}
