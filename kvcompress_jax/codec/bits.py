"""Eight bits to a byte, for codes of any width."""

import jax
import jax.numpy as jnp


def pack_bits(bits: jax.Array) -> jax.Array:
    """u8[..., 8 n] of zeros and ones to u8[..., n]; bit i of byte j is element 8 j + i.

    Raises:
      ValueError: the last axis is no multiple of 8, or the dtype is not uint8.
    """
    if bits.dtype != jnp.uint8 or bits.ndim < 1 or bits.shape[-1] % 8:
        raise ValueError(f"bits: expected uint8[..., 8 n], got {bits.dtype}{list(bits.shape)}")
    by_byte = bits.reshape(*bits.shape[:-1], -1, 8)
    places = jnp.arange(8, dtype=jnp.uint8).reshape((1,) * (by_byte.ndim - 1) + (8,))
    return jnp.sum(by_byte << places, axis=-1, dtype=jnp.uint8)


def unpack_bits(packed: jax.Array) -> jax.Array:
    """u8[..., n] to u8[..., 8 n] of zeros and ones: the inverse of `pack_bits`."""
    places = jnp.arange(8, dtype=jnp.uint8).reshape((1,) * packed.ndim + (8,))
    bits = (packed[..., None] >> places) & jnp.uint8(1)
    return bits.reshape(*packed.shape[:-1], -1)
