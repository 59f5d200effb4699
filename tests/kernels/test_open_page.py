"""`open_page` and `hadamard`, interpreted, against NumPy in float64."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kvcompress_jax.codec.hadamard import hadamard_matrix
from kvcompress_jax.kernels.hadamard import hadamard
from kvcompress_jax.kernels.hadamard.matrix import signs
from kvcompress_jax.kernels.hadamard.reference import hadamard_reference
from kvcompress_jax.kernels.hadamard.triton import hadamard_triton
from kvcompress_jax.kernels.open_page import open_page
from kvcompress_jax.kernels.open_page.reference import open_page_reference
from kvcompress_jax.kernels.open_page.triton import open_page_triton
from tests.kernels.pages import HEADS, LAYERS, PAGES, decode_float64, empty_pools

OPENED, CHUNK_OF, COUNT = [3, 0, 4], [[6, 1], [-1, 2], [0, 0]], 2  # the third is padding
# page size, dim, fine rows, dtype, channels of a piece, bits of a refined slot
SIZES = [
    (16, 64, 8, "bfloat16", 16, 4),
    (32, 96, 10, "float16", 16, 4),
    (16, 128, 16, "float32", 64, 4),
    (16, 256, 0, "bfloat16", 32, 4),
    (32, 96, 16, "float16", 16, 2),
    (32, 96, 5, "float16", 16, 2),
]


def random_pools(page_size, dim, fine_rows, fine_bits):
    """Random codes and scales in the pages and chunks that are opened, poison elsewhere."""
    random = np.random.default_rng(0)
    pools = empty_pools(page_size, dim, fine_rows, fine_bits)
    shuffled = np.tile(np.arange(page_size), (LAYERS, PAGES, HEADS, 1))
    used = np.isin(np.arange(PAGES), OPENED[:COUNT])

    def scale(like, spread):
        filled = random.uniform(0.1, 1.0, like.shape) * spread
        kept = np.where(used[None, :, None, None], filled, np.nan)
        return jnp.asarray(kept, jnp.float32).astype(like.dtype)

    def codes(like):
        return jnp.asarray(random.integers(0, 256, like.shape), jnp.uint8)

    return dataclasses.replace(
        pools,
        base=codes(pools.base),
        fine=codes(pools.fine),
        key_step=scale(pools.key_step, 4.0),
        key_zero=scale(pools.key_zero, -20.0),
        value_step=scale(pools.value_step, 0.5),
        value_zero=scale(pools.value_zero, -9.0),
        order=jnp.asarray(random.permuted(shuffled, axis=-1), jnp.uint8),
    )


def is_decoded(kv, pools, dtype):
    """Float32 takes three roundings, of which each is 2**-24 of at most 40 steps (zero points of 20
    and 15 codes), and then the dtype rounds once."""
    for entry in range(COUNT):
        want = decode_float64(pools, OPENED[entry], CHUNK_OF[entry])
        got = np.asarray(kv[:, entry], np.float64)
        bound = np.abs(want) * float(jnp.finfo(dtype).eps) / 2 + 4.0 * 40 * 3 * 2.0**-24
        if not np.all(np.abs(got - want) <= bound):
            return False
    return True


@pytest.mark.parametrize(("page_size", "dim", "fine_rows", "dtype", "channels", "fine_bits"), SIZES)
def test_open_page_decodes_what_the_format_says(
    page_size, dim, fine_rows, dtype, channels, fine_bits
):
    pools = random_pools(page_size, dim, fine_rows, fine_bits)
    tables = {
        "pages": jnp.array(OPENED, jnp.int32),
        "chunks": jnp.array(CHUNK_OF, jnp.int32),
        "count": jnp.int32(COUNT),
        "dtype": jnp.dtype(dtype),
    }
    tuning = {"num_warps": 4, "num_stages": 1, "channels": channels}
    kernel = jax.jit(lambda pools: open_page_triton(pools, **tables, tuning=tuning, interpret=True))
    for kv in (kernel(pools), open_page_reference(pools, **tables), open_page(pools, **tables)):
        assert kv.shape == (LAYERS, len(OPENED), 2, HEADS, page_size, dim)
        assert kv.dtype == jnp.dtype(dtype)
        assert is_decoded(kv, pools, dtype)
    # One bit of a code, one token's place, and at level 1 the fine plane matter.
    bit = dataclasses.replace(pools, base=pools.base.at[0, OPENED[1], 1, 1, 7].add(jnp.uint8(1)))
    assert not is_decoded(kv, bit, dtype)
    moved = dataclasses.replace(pools, order=pools.order[..., ::-1])
    assert not is_decoded(kv, moved, dtype)
    if fine_rows:
        finer = pools.fine.at[CHUNK_OF[0][1], 0, 1, 0].add(jnp.uint8(1 << 6))
        assert not is_decoded(kv, dataclasses.replace(pools, fine=finer), dtype)


def test_open_page_refuses_bad_input():
    pools = empty_pools(16, 64, 8)
    pages, chunks = jnp.array(OPENED, jnp.int32), jnp.array(CHUNK_OF, jnp.int32)
    with pytest.raises(ValueError, match=r"^chunks: expected int32\[3, 2\], got int32\[2, 2\]$"):
        open_page(pools, pages=pages, chunks=chunks[:2], count=jnp.int32(2), dtype=jnp.bfloat16)
    with pytest.raises(ValueError, match=r"^dtype: expected bfloat16, .*, got "):
        open_page(pools, pages=pages, chunks=chunks, count=jnp.int32(2), dtype=jnp.int8)


def test_pools_that_triton_cannot_address_are_refused():
    pools = empty_pools(16, 64, 8)
    large = dataclasses.replace(pools, base=jax.ShapeDtypeStruct((3, 1024, 2, 8, 65536), jnp.uint8))
    tables = {"count": jnp.int32(1), "dtype": jnp.bfloat16}
    with pytest.raises(
        NotImplementedError, match=r"^base: expected at most 2 GiB .* got 3\.00 GiB"
    ):
        open_page_triton(
            large,
            pages=jnp.zeros((1,), jnp.int32),
            chunks=jnp.zeros((1, 3), jnp.int32),
            tuning={"num_warps": 4, "num_stages": 1, "channels": 32},
            **tables,
        )


@pytest.mark.parametrize("dim", [64, 96, 128, 256])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_hadamard_is_the_product_with_the_matrix(dim, dtype):
    x = jax.random.normal(jax.random.key(dim), (3, 7, dim)).at[..., 5].mul(40.0).astype(dtype)
    matrix = hadamard_matrix(dim)
    assert np.array_equal(signs(dim), np.sign(matrix))
    want = np.asarray(x, np.float64) @ matrix
    # One rounding to the dtype, and float32 sums of dim numbers of at most 200.
    bound = np.abs(want) * float(jnp.finfo(dtype).eps) / 2 + dim * 200 * 2.0**-24 * dim**-0.5

    def obeys(y):
        return y.dtype == x.dtype and np.all(np.abs(np.asarray(y, np.float64) - want) <= bound)

    tuning = {"num_warps": 4, "num_stages": 1, "rows": 16}
    y = jax.jit(lambda x: hadamard_triton(x, tuning=tuning, interpret=True))(x)
    assert obeys(y)
    assert obeys(hadamard_reference(x))
    assert obeys(hadamard(x))
    assert not obeys(x)
    assert not obeys(y * jnp.asarray(1.02, x.dtype))
    assert not obeys(y[::-1])


def test_hadamard_refuses_what_it_cannot_do():
    with pytest.raises(NotImplementedError, match=r"^hadamard: .*dim: expected 2\*\*k or 12"):
        hadamard(jnp.zeros((2, 80), jnp.bfloat16))
    with pytest.raises(NotImplementedError, match="x: expected bfloat16 or float16, got float32"):
        hadamard_triton(jnp.zeros((2, 64), jnp.float32))
