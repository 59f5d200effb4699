"""Sealed pages back to keys and values."""

import functools

import jax
import jax.numpy as jnp

from kvcompress_jax.calibrated import CalibratedCode, RowLayout, decode_rows
from kvcompress_jax.codec import (
    Scale,
    narrow,
    reconstruct,
    refined_position,
    unpack,
    unpack_both,
)
from kvcompress_jax.paged.cache import PagedCache
from kvcompress_jax.paged.plane_bytes import split_fine, split_planes

FLOAT32 = jnp.dtype("float32")


def decode_pages(
    cache: PagedCache,
    layer: jax.Array | int,
    ids: jax.Array,
    live: jax.Array | None = None,
    *,
    dtype: jnp.dtype = FLOAT32,
) -> tuple[jax.Array, jax.Array]:
    """Keys and values of sealed pages at their level, in slot order.

    Args:
      cache: the paged cache.
      layer: i32[].
      ids: i32[...] page ids, all in range.
      live: bool[...]: pages to decode; the others read as zeros, whatever they hold. None: all.
      dtype: of the result.

    Returns:
      keys and values, [..., heads, page_size, dim]; slot j holds token `slot_tokens(...)[..., j]`.
    """
    keys, values = _decode(cache, layer, ids, live)
    return narrow(keys, dtype), narrow(values, dtype)


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


def _decode(
    cache: PagedCache, layer: jax.Array | int, ids: jax.Array, live: jax.Array | None
) -> tuple[jax.Array, jax.Array]:
    layout = cache.layout
    if cache.code is not None and layout.rows is not None:
        return _decode_row_pages(cache, cache.code.at(layer), layout.rows, layer, ids, live)
    key_scale = _scale_of(cache.key_scale, layer, ids, live)
    value_scale = _scale_of(cache.value_scale, layer, ids, live)
    packed = split_planes(cache.base[layer, ids], layout.head_dim)
    if layout.fine_rows and cache.fine.shape[0]:
        fine, has = _fine_rows(cache, layer, ids, live)
        keys, values = (_positions(x, y, has) for x, y in zip(packed, fine, strict=True))
    else:
        keys, values = (unpack(x).astype(jnp.float32) for x in packed)
    return reconstruct(keys, key_scale, axis=-2), reconstruct(values, value_scale, axis=-1)


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


def _fine_rows(
    cache: PagedCache, layer: jax.Array | int, ids: jax.Array, live: jax.Array | None
) -> tuple[tuple[jax.Array, jax.Array], jax.Array]:
    """Packed fine codes of keys and of values, u8[..., heads, refined_slots, dim/2], 0 in pages
    without; and bool[..., 1, 1, 1], which pages have some."""
    chunk = cache.fine_of[layer, ids]
    has = chunk >= 0 if live is None else live & (chunk >= 0)
    fine = cache.fine[jnp.where(has, chunk, 0)]
    has = has[..., None, None, None]
    fine, layout = jnp.where(has, fine, jnp.uint8(0)), cache.layout
    return split_fine(fine, layout.head_dim, layout.fine_bits), has


def _positions(base: jax.Array, fine: jax.Array, has: jax.Array) -> jax.Array:
    """In steps, f32[..., heads, page_size, dim], of packed rows, the first of which are refined."""
    first, rest = jnp.split(base, [fine.shape[-2]], axis=-2)
    refined = refined_position(unpack_both(first, fine), has)
    return jnp.concatenate([refined, unpack(rest).astype(jnp.float32)], axis=-2)
