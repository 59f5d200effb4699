"""How the codes of a page's keys and values lie in a plane: the bytes of `base` and of `fine`.

A plane is u8[..., 2, heads, rows * dim/2]. For each head, the key half is [rows, dim/2] and the
value half is its transpose, [dim/2, rows]: attention multiplies keys by what has dim channels, and
values by what has a weight for each row, and a GPU reads either the way its tensor cores want it.
In both, byte j of the channel axis holds channel j in its low nibble and channel j + dim/2 in its
high one. In a fine plane of two bits, row i holds slot i in the lower two bits of each nibble, and
slot rows + i in the upper two.
"""

import jax
import jax.numpy as jnp

from kvcompress_jax.codec import pack, separate_rows, share_rows, unpack


def refined_slots(fine_rows: int, fine_bits: int) -> int:
    """Slots of a page that a fine plane of so many rows refines by so many bits each."""
    return fine_rows * 4 // fine_bits


def join_planes(keys: jax.Array, values: jax.Array) -> jax.Array:
    """Packed rows, u8[..., heads, rows, dim/2] each, to a plane u8[..., 2, heads, rows * dim/2]."""
    flat = (*keys.shape[:-2], keys.shape[-2] * keys.shape[-1])
    halves = keys.reshape(flat), values.swapaxes(-1, -2).reshape(flat)
    return jnp.stack(halves, axis=-3)


def join_fine(keys: jax.Array, values: jax.Array, fine_bits: int) -> jax.Array:
    """Packed fine codes of refined slots, u8[..., heads, slots, dim/2] each, to a fine plane."""
    if fine_bits == 2:
        keys, values = share_rows(keys), share_rows(values)
    return join_planes(keys, values)


def split_fine(plane: jax.Array, dim: int, fine_bits: int) -> tuple[jax.Array, jax.Array]:
    """The inverse of `join_fine`."""
    keys, values = split_planes(plane, dim)
    if fine_bits == 2:
        return separate_rows(keys), separate_rows(values)
    return keys, values


def pack_planes(keys: jax.Array, values: jax.Array) -> jax.Array:
    """Codes 0..15, u8[..., heads, rows, dim] each, to a plane u8[..., 2, heads, rows * dim/2]."""
    return join_planes(pack(keys), pack(values))


def unpack_planes(plane: jax.Array, dim: int) -> tuple[jax.Array, jax.Array]:
    """A plane to the codes of keys and values: the inverse of `pack_planes`.

    Args:
      plane: u8[..., 2, heads, rows * dim/2].
      dim: channels of a head.

    Returns:
      keys and values, u8[..., heads, rows, dim], 0..15.
    """
    keys, values = split_planes(plane, dim)
    return unpack(keys), unpack(values)


def split_planes(plane: jax.Array, dim: int) -> tuple[jax.Array, jax.Array]:
    """A plane to packed rows, u8[..., heads, rows, dim/2] each: the inverse of `join_planes`."""
    *lead, size = plane.shape
    half = dim // 2
    rows = size // half
    keys = plane[..., 0, :, :].reshape(*lead[:-2], lead[-1], rows, half)
    values = plane[..., 1, :, :].reshape(*lead[:-2], lead[-1], half, rows)
    return keys, values.swapaxes(-1, -2)
