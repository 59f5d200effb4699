"""Packing is a bijection with the documented nibble order."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kvcompress_jax.codec import (
    pack,
    pack_high,
    pack_low,
    separate_rows,
    share_rows,
    unpack,
    unpack_both,
    unpack_halves,
)


@pytest.mark.parametrize("dim", [2, 64, 96, 128, 256])
def test_round_trip(dim):
    codes = jax.random.randint(jax.random.key(0), (3, 5, dim), 0, 16).astype(jnp.uint8)
    packed = pack(codes)
    assert packed.shape == (3, 5, dim // 2)
    assert packed.dtype == jnp.uint8
    assert np.array_equal(unpack(packed), codes)
    assert not np.array_equal(unpack(packed ^ jnp.uint8(1)), codes)


def test_every_byte():
    every = jnp.arange(256, dtype=jnp.uint8).reshape(8, 32)
    assert np.array_equal(pack(unpack(every)), every)


def test_nibble_order():
    """Channel j is the low nibble of byte j, channel j + dim/2 the high one."""
    assert np.array_equal(pack(jnp.array([1, 2, 3, 4], jnp.uint8)), [1 | 3 << 4, 2 | 4 << 4])


@pytest.mark.parametrize("codes", [jnp.zeros((4, 3), jnp.uint8), jnp.zeros((4, 4), jnp.int32)])
def test_refuses_what_it_cannot_pack(codes):
    with pytest.raises(ValueError, match=r"codes: expected uint8\[..., even\], got"):
        pack(codes)


def test_both_nibbles_of_any_byte():
    """What `pack_high` and `pack_low` take of bytes, `unpack_both` puts together again."""
    every = jnp.arange(256, dtype=jnp.uint8).reshape(8, 32)
    assert np.array_equal(pack_low(every), pack(every & jnp.uint8(15)))
    assert np.array_equal(pack_high(every), pack(every >> jnp.uint8(4)))
    halves = jnp.split(every, 2, axis=-1)
    assert np.array_equal(unpack_both(pack_high(every), pack_low(every)), halves)
    assert not np.array_equal(unpack_both(pack_low(every), pack_high(every)), halves)


def test_two_rows_of_two_bits_share_one():
    codes = 4 * jax.random.randint(jax.random.key(0), (3, 8, 64), 0, 4).astype(jnp.uint8)
    shared = share_rows(pack(codes))
    assert shared.shape == (3, 4, 32)
    assert np.array_equal(unpack(separate_rows(shared)), codes)
    # The first half of the rows has the lower bits.
    assert np.array_equal(4 * (unpack(shared) & jnp.uint8(3)), codes[:, :4])
    assert not np.array_equal(codes[:, 4:], codes[:, :4])


def test_channels_and_rows_may_lie_along_any_axis():
    codes = 4 * jax.random.randint(jax.random.key(1), (3, 8, 64), 0, 4).astype(jnp.uint8)
    turned = codes.swapaxes(-1, -2)
    for function in (pack, pack_low, pack_high, unpack):
        other = function(turned, axis=-2).swapaxes(-1, -2)
        assert np.array_equal(function(codes), other)
        assert other.shape != codes.shape
    packed = pack(codes)
    shared = share_rows(packed.swapaxes(-1, -2), axis=-1)
    assert np.array_equal(share_rows(packed), shared.swapaxes(-1, -2))
    assert np.array_equal(separate_rows(shared, axis=-1), packed.swapaxes(-1, -2))
    assert np.array_equal(jnp.concatenate(unpack_halves(packed), axis=-1), codes)
