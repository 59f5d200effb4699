"""The codes of sealed pages, the two halves of the channels apart, as a packed byte holds them."""

import dataclasses

import jax
import jax.numpy as jnp

from kvcompress_jax.codec import refined_position, separate_rows, unpack_both, unpack_halves
from kvcompress_jax.paged.cache import PagedCache
from kvcompress_jax.paged.plane_bytes import split_planes


@dataclasses.dataclass(frozen=True)
class HalvedCodes:
    """Codes of the keys or of the values of pages: of 4 bits, or, where the cache has a fine plane,
    bytes as `encode_bytes` gives them."""

    halves: tuple[jax.Array, jax.Array]  # u8[..., heads, page_size, dim/2] of channels, or turned
    refined: jax.Array | None  # bool, broadcastable to halves: with a fine code; None: 4 bits

    def position(self, codes: jax.Array) -> jax.Array:
        """In steps, f32 of the shape of `codes`: one of the halves, or both along the channels."""
        if self.refined is None:
            return codes.astype(jnp.float32)
        return refined_position(codes, self.refined)


def read_halves(
    cache: PagedCache,
    layer: jax.Array | int,
    ids: jax.Array,
    live: jax.Array | None,
    *,
    turn_values: bool,
) -> tuple[HalvedCodes, HalvedCodes]:
    """Codes of keys and values at their level, in slot order; arguments as in `decode_pages`.

    `turn_values`: halves of values are u8[..., heads, page_size, dim/2] like those of keys, or,
    where it is False, u8[..., heads, dim/2, page_size], which is how planes hold them.
    """
    layout = cache.layout
    slot_axes = (-2, -2 if turn_values else -1)

    def packed(plane: jax.Array) -> tuple[jax.Array, jax.Array]:
        keys, values = split_planes(plane, layout.head_dim)
        return keys, values.swapaxes(-1, -2) if turn_values else values

    base = packed(cache.base[layer, ids])
    if not layout.fine_rows or not cache.fine.shape[0]:
        keys, values = (HalvedCodes(unpack_halves(x), None) for x in base)
        return keys, values
    chunk = cache.fine_of[layer, ids]
    has = chunk >= 0 if live is None else live & (chunk >= 0)
    fine = cache.fine[jnp.where(has, chunk, 0)]
    packed_fine = packed(jnp.where(has[..., None, None, None], fine, jnp.uint8(0)))
    slot = jnp.arange(layout.page_size, dtype=jnp.int32)

    def codes(base: jax.Array, fine: jax.Array, axis: int) -> HalvedCodes:
        if layout.fine_bits == 2:
            fine = separate_rows(fine, axis=axis)
        fine = _with_zeros(fine, layout.page_size - layout.refined_slots, axis=axis)
        refined = (slot < layout.refined_slots).reshape((1,) * has.ndim + (1, -1))
        refined = jnp.expand_dims(has[..., None, None] & refined, -1 if axis == -2 else -2)
        return HalvedCodes(unpack_both(base, fine), refined)

    keys, values = (codes(*x) for x in zip(base, packed_fine, slot_axes, strict=True))
    return keys, values


def _with_zeros(x: jax.Array, more: int, *, axis: int) -> jax.Array:
    pad = [(0, 0)] * x.ndim
    pad[axis] = (0, more)
    return jnp.pad(x, pad)
