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
    """Packed codes as they are to lie, keys u8[..., heads, rows, dim/2] and values u8[..., heads,
    dim/2, rows], to a plane u8[..., 2, heads, rows * dim/2]."""
    return jnp.stack([flat(keys), flat(values)], axis=-3)


def flat(packed: jax.Array) -> jax.Array:
    """Packed codes of keys or of values, in the order in which a plane has their bytes."""
    return packed.reshape(*packed.shape[:-2], packed.shape[-2] * packed.shape[-1])


def split_planes(plane: jax.Array, dim: int) -> tuple[jax.Array, jax.Array]:
    """The inverse of `join_planes`."""
    *lead, size = plane.shape
    half = dim // 2
    rows = size // half
    keys = plane[..., 0, :, :].reshape(*lead[:-2], lead[-1], rows, half)
    values = plane[..., 1, :, :].reshape(*lead[:-2], lead[-1], half, rows)
    return keys, values


def share_fine(keys: jax.Array, values: jax.Array, fine_bits: int) -> tuple[jax.Array, jax.Array]:
    """Packed fine codes of refined slots, shaped like those of `join_planes`, as a fine plane has
    them: what `join_planes` takes."""
    if fine_bits == 2:
        return share_rows(keys), share_rows(values, axis=-1)
    return keys, values


def split_fine(plane: jax.Array, dim: int, fine_bits: int) -> tuple[jax.Array, jax.Array]:
    """The inverse of `share_fine` and `join_planes`."""
    keys, values = split_planes(plane, dim)
    if fine_bits == 2:
        return separate_rows(keys), separate_rows(values, axis=-1)
    return keys, values


def pack_planes(keys: jax.Array, values: jax.Array) -> jax.Array:
    """Codes 0..15, u8[..., heads, rows, dim] each, to a plane u8[..., 2, heads, rows * dim/2]."""
    return join_planes(pack(keys), pack(values.swapaxes(-1, -2), axis=-2))


def unpack_planes(plane: jax.Array, dim: int) -> tuple[jax.Array, jax.Array]:
    """A plane to the codes of keys and values: the inverse of `pack_planes`.

    Args:
      plane: u8[..., 2, heads, rows * dim/2].
      dim: channels of a head.

    Returns:
      keys and values, u8[..., heads, rows, dim], 0..15.
    """
    return _by_row(split_planes(plane, dim))


def unpack_fine(plane: jax.Array, dim: int, fine_bits: int) -> tuple[jax.Array, jax.Array]:
    """Like `unpack_planes`, of a fine plane: of all slots that it refines."""
    return _by_row(split_fine(plane, dim, fine_bits))


def _by_row(packed: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
    keys, values = packed
    return unpack(keys), unpack(values, axis=-2).swapaxes(-1, -2)
