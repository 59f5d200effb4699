"""Sealed pages back to keys and values."""

import functools

import jax
import jax.numpy as jnp
from jax import lax

from kvcompress_jax.calibrated import CalibratedCode, RowLayout, decode_rows
from kvcompress_jax.codec import Scale, narrow, reconstruct
from kvcompress_jax.kernels.dispatch import dispatch
from kvcompress_jax.kernels.open_page.cpu import open_slots_cpu
from kvcompress_jax.paged.cache import PagedCache, code_pools
from kvcompress_jax.paged.page_halves import read_halves
from kvcompress_jax.paged.products import KeyValueBlock, PageByPage, block_of, goes_page_by_page

FLOAT32 = jnp.dtype("float32")


def decode_pages(
    cache: PagedCache,
    layer: jax.Array | int,
    ids: jax.Array,
    live: jax.Array | None = None,
    *,
    dtype: jnp.dtype = FLOAT32,
    implementation: str | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Keys and values of sealed pages at their level, in slot order.

    Args:
      cache: the paged cache.
      layer: i32[].
      ids: i32[...] page ids, all in range.
      live: bool[...]: pages to decode; the others read as zeros, whatever they hold. None: all.
      dtype: of the result.
      implementation: of pages with planes: "cpu", in C++, or "xla", the same to the bit; None: the
        first that can. A name never falls back to another.

    Returns:
      keys and values, [..., heads, page_size, dim]; slot j holds token `slot_tokens(...)[..., j]`.

    Raises:
      ValueError: an implementation that does not exist.
      NotImplementedError: the implementation that was named cannot do this.
    """
    layout = cache.layout
    if cache.code is not None and layout.rows is not None:
        if implementation not in (None, "xla"):
            raise NotImplementedError(
                f"implementation: expected xla for a calibrated code, got {implementation}"
            )
        keys, values = _decode_row_pages(cache, cache.code.at(layer), layout.rows, layer, ids, live)
        return narrow(keys, dtype), narrow(values, dtype)
    implementations = {"cpu": _decode_planes_cpu, "xla": _decode_planes}
    opened: tuple[jax.Array, jax.Array] = dispatch(
        "decode_pages", implementations, implementation, cache, layer, ids, live, dtype=dtype
    )
    return opened


def _decode_planes_cpu(
    cache: PagedCache,
    layer: jax.Array | int,
    ids: jax.Array,
    live: jax.Array | None,
    *,
    dtype: jnp.dtype,
) -> tuple[jax.Array, jax.Array]:
    if live is not None:
        ids = jnp.where(live, ids, -1)
    chunks = cache.fine_of[layer, jnp.maximum(ids, 0)]
    return open_slots_cpu(code_pools(cache), layer, ids, chunks, dtype=dtype)


def _decode_planes(
    cache: PagedCache,
    layer: jax.Array | int,
    ids: jax.Array,
    live: jax.Array | None,
    *,
    dtype: jnp.dtype,
) -> tuple[jax.Array, jax.Array]:
    codes = read_halves(cache, layer, ids, live, turn_values=True)
    keys, values = (x.position(_joined(x.halves)) for x in codes)
    key_scale, value_scale = _scales(cache, layer, ids, live)
    return (
        narrow(reconstruct(keys, key_scale, axis=-2), dtype),
        narrow(reconstruct(values, value_scale, axis=-1), dtype),
    )


def _joined(halves: tuple[jax.Array, jax.Array]) -> jax.Array:
    if jax.default_backend() != "cpu":
        return jnp.concatenate(halves, axis=-1)
    # Fused with what comes before and after, XLA asks for every number in which half it is: with
    # both in memory on the way it takes three quarters of the time.
    halves = lax.optimization_barrier(halves)
    return lax.optimization_barrier(jnp.concatenate(halves, axis=-1))


def read_pages(
    cache: PagedCache, layer: jax.Array | int, ids: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Like `decode_pages`, but in token order: for export and for measuring.

    The exact first tokens of a sequence are not part of its first page's code; what stands here
    for them is the code of the nearest values in range.
    """
    keys, values = decode_pages(cache, layer, ids)
    slot_of_token = jnp.argsort(slot_tokens(cache, layer, ids), axis=-1)[..., None]
    return (
        jnp.take_along_axis(keys, slot_of_token, axis=-2),
        jnp.take_along_axis(values, slot_of_token, axis=-2),
    )


def slot_tokens(cache: PagedCache, layer: jax.Array | int, ids: jax.Array) -> jax.Array:
    """i32[..., heads, page_size]: the token of its page that each slot of sealed pages holds."""
    layout = cache.layout
    if layout.rows is None:
        return cache.order[layer, ids].astype(jnp.int32)
    tokens = jnp.arange(layout.page_size, dtype=jnp.int32)
    return jnp.broadcast_to(tokens, (*ids.shape, layout.kv_heads, layout.page_size))


def decode_block(
    cache: PagedCache, layer: jax.Array | int, ids: jax.Array, live: jax.Array, *, queries: int
) -> KeyValueBlock:
    """Like `decode_pages`, for attention: with few queries, what lies in base and fine planes stays
    where it lies.

    Args:
      cache, layer: as in `decode_pages`.
      ids: i32[sequences, pages] page ids, all in range.
      live: bool[sequences, pages]: pages to decode; the others read as zeros.
      queries: of a sequence, times query heads of a KV head.
    """
    if cache.layout.rows is not None or not goes_page_by_page(queries):
        return block_of(*decode_pages(cache, layer, ids, live), queries=queries)
    keys, values = read_halves(cache, layer, ids, live, turn_values=False)
    key_scale, value_scale = _scales(cache, layer, ids, live)
    steps, zeros = (jnp.split(x, 2, axis=-1) for x in (key_scale.step, key_scale.zero))
    key_scales = [Scale(step=x, zero=y) for x, y in zip(steps, zeros, strict=True)]
    return PageByPage(
        keys=tuple(
            reconstruct(keys.position(half), scale, axis=-2)
            for half, scale in zip(keys.halves, key_scales, strict=True)
        ),
        values=tuple(
            reconstruct(values.position(half), value_scale, axis=-2) for half in values.halves
        ),
        turned=True,
    )


def _decode_row_pages(
    cache: PagedCache,
    code: CalibratedCode,
    rows: RowLayout,
    layer: jax.Array | int,
    ids: jax.Array,
    live: jax.Array | None,
) -> tuple[jax.Array, jax.Array]:
    flat = ids.reshape(-1)
    one = functools.partial(decode_rows, code=code, rows=rows)
    decoded = jax.vmap(one)(cache.base[layer, flat], cache.refined[layer, flat], cache.first[flat])
    keys, values = (x.reshape(*ids.shape, *x.shape[1:]) for x in decoded)
    if live is None:
        return keys, values
    live = live[..., None, None, None]
    return jnp.where(live, keys, 0.0), jnp.where(live, values, 0.0)


def _scales(
    cache: PagedCache, layer: jax.Array | int, ids: jax.Array, live: jax.Array | None
) -> tuple[Scale, Scale]:
    return (
        _scale_of(cache.key_scale, layer, ids, live),
        _scale_of(cache.value_scale, layer, ids, live),
    )


def _scale_of(
    scale: Scale, layer: jax.Array | int, ids: jax.Array, live: jax.Array | None
) -> Scale:
    picked = Scale(step=scale.step[layer, ids], zero=scale.zero[layer, ids])
    if live is None:
        return picked
    live = live[..., None, None]
    return Scale(
        step=jnp.where(live, picked.step, jnp.zeros_like(picked.step)),
        zero=jnp.where(live, picked.zero, jnp.zeros_like(picked.zero)),
    )
