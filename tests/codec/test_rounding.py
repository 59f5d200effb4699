"""Rounding in integers is rounding."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from kvcompress_jax.codec import narrow


def every_kind():
    """Random bits, so that all exponents, infinities and NaNs are among them; ties; extremes."""
    words = np.random.default_rng(0).integers(0, 2**32, 1 << 20, np.uint32)
    ties = (np.arange(1 << 16, dtype=np.uint32) << 16) | 0x8000
    extremes = np.array([0x7F7FFFFF, 0xFF7FFFFF, 0x7F800000, 0xFF800000, 0x7F800001, 0x7FFFFFFF])
    return np.concatenate([words, ties, extremes.astype(np.uint32)]).view(np.float32)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_is_the_conversion_to_the_bit(dtype):
    x = every_kind()
    got = np.asarray(jax.jit(narrow, static_argnums=1)(x, jnp.dtype(dtype)))
    with np.errstate(over="ignore", invalid="ignore"):
        want = x.astype(jnp.dtype(dtype))
    assert got.dtype == want.dtype
    nan = np.isnan(want)
    assert np.array_equal(np.isnan(got), nan)
    assert np.array_equal(got[~nan].view(np.uint8), want[~nan].view(np.uint8))


def test_truncation_is_not_rounding():
    """The judge can say no."""
    x = np.random.default_rng(0).normal(size=1000).astype(np.float32)
    cut = (x.view(np.uint32) & 0xFFFF0000).view(np.float32).astype(ml_dtypes.bfloat16)
    assert not np.array_equal(cut, np.asarray(narrow(jnp.asarray(x), jnp.dtype("bfloat16"))))
