"""The bytes of planes, as documented."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kvcompress_jax.paged.plane_bytes import pack_planes, unpack_planes


@pytest.mark.parametrize("rows", [0, 16, 19])
def test_every_code_lies_where_the_format_says(rows):
    dim, codes = 8, np.random.default_rng(0).integers(0, 16, (2, 3, 2, rows, 8), np.uint8)
    plane = jax.jit(pack_planes)(jnp.asarray(codes[0]), jnp.asarray(codes[1]))
    assert plane.shape == (3, 2, 2, rows * dim // 2)
    for page, head, row, channel in np.ndindex(codes.shape[1:]):
        byte = channel % (dim // 2)
        for kind, place in enumerate((row * dim // 2 + byte, byte * rows + row)):
            nibble = int(plane[page, kind, head, place]) >> (4 * (channel // (dim // 2))) & 15
            assert nibble == codes[kind, page, head, row, channel]
    assert np.array_equal(np.stack(unpack_planes(plane, dim)), codes)
