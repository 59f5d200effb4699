"""Two 4-bit codes to a byte.

Byte j of a vector of dim codes holds channel j in its low nibble and channel j + dim/2 in its
high one, so that unpacking gives two contiguous halves and needs no interleaving.

Codes that are multiples of 4 take two bits: two rows then share one.
"""

import jax
import jax.numpy as jnp


def pack(codes: jax.Array, *, axis: int = -1) -> jax.Array:
    """u8[..., dim] with values 0..15 to u8[..., dim/2]; the channels lie along `axis`.

    Raises:
      ValueError: dim is odd, or the dtype is not uint8.
    """
    if codes.dtype != jnp.uint8 or codes.ndim < 1 or codes.shape[axis] % 2:
        raise ValueError(f"codes: expected uint8[..., even], got {codes.dtype}{list(codes.shape)}")
    low, high = jnp.split(codes, 2, axis=axis)
    return low | (high << jnp.uint8(4))


def pack_low(codes: jax.Array, *, axis: int = -1) -> jax.Array:
    """Like `pack`, of the low nibbles of any bytes."""
    low, high = jnp.split(codes, 2, axis=axis)
    return (low & jnp.uint8(15)) | (high << jnp.uint8(4))


def pack_high(codes: jax.Array, *, axis: int = -1) -> jax.Array:
    """Like `pack`, of the high nibbles of any bytes. By `pack`, which would shift half of them down
    and up again, sealing takes four tenths longer on CPUs."""
    low, high = jnp.split(codes, 2, axis=axis)
    return (low >> jnp.uint8(4)) | (high & jnp.uint8(0xF0))


def unpack(packed: jax.Array, *, axis: int = -1) -> jax.Array:
    """u8[..., dim/2] to u8[..., dim] with values 0..15: the inverse of `pack`."""
    return jnp.concatenate(unpack_halves(packed), axis=axis)


def unpack_halves(packed: jax.Array) -> tuple[jax.Array, jax.Array]:
    """What `pack` made bytes of, 0..15: the codes of the first half of the channels, and of the
    second."""
    return packed & jnp.uint8(15), packed >> jnp.uint8(4)


def unpack_both(base: jax.Array, fine: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Like `unpack_halves`, of two planes: the bytes of `encode_bytes`, which `pack_high` and
    `pack_low` took apart."""
    low = ((base & jnp.uint8(15)) << jnp.uint8(4)) | (fine & jnp.uint8(15))
    return low, (base & jnp.uint8(0xF0)) | (fine >> jnp.uint8(4))


def share_rows(packed: jax.Array, *, axis: int = -2) -> jax.Array:
    """Packed rows of multiples of 4, u8[..., 2 n, dim/2], to u8[..., n, dim/2]: in row i, row i has
    the lower two bits of each nibble, and row n + i the upper two, where they were. The rows lie
    along `axis`."""
    first, second = jnp.split(packed, 2, axis=axis)
    return (first >> jnp.uint8(2)) | second


def separate_rows(shared: jax.Array, *, axis: int = -2) -> jax.Array:
    """The inverse of `share_rows`."""
    upper = jnp.uint8(0xCC)
    return jnp.concatenate([(shared << jnp.uint8(2)) & upper, shared & upper], axis=axis)
