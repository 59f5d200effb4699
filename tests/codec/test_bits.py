import jax.numpy as jnp
import numpy as np
import pytest

from kvcompress_jax.codec.bits import pack_bits, unpack_bits


def test_every_byte_comes_back():
    packed = jnp.arange(256, dtype=jnp.uint8).reshape(4, 64)
    bits = unpack_bits(packed)
    want = (np.asarray(packed)[..., None] >> np.arange(8)) & 1
    assert np.array_equal(bits.reshape(4, 64, 8), want)
    assert np.array_equal(pack_bits(bits), packed)
    assert not np.array_equal(pack_bits(bits[..., ::-1]), packed)


@pytest.mark.parametrize("shape", [(7,), (2, 12)])
def test_whole_bytes_only(shape):
    with pytest.raises(ValueError, match=r"bits: expected uint8\[..., 8 n\], got uint8"):
        pack_bits(jnp.zeros(shape, jnp.uint8))
