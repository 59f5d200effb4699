"""The codec compiled for a GPU codes as it does on a CPU. Skipped without a GPU."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kvcompress_jax.codec import Scale, decode, encode, fit_scale

pytestmark = pytest.mark.skipif(jax.default_backend() != "gpu", reason="there is no GPU")


@jax.jit
def code(x: jax.Array) -> tuple[Scale, jax.Array, jax.Array]:
    scale = fit_scale(x, axis=0)
    return scale, *encode(x, scale, axis=0)


def test_codes_belong_to_the_scale_that_is_stored():
    """Zero points of up to 2048 steps, which float16 rounds by up to half a step."""
    offset = jnp.linspace(0, 900, 512)
    x = jax.random.normal(jax.random.key(0), (64, 512)) + offset[None]
    scale, base, fine = code(x)
    with jax.default_device(jax.devices("cpu")[0]):
        there, base_there, _ = code(jnp.asarray(np.asarray(x)))
    assert np.array_equal(scale.step, there.step)
    assert np.mean(np.asarray(scale.zero) != np.asarray(there.zero)) <= 0.01
    assert np.mean(np.asarray(base) != np.asarray(base_there)) <= 0.01
    step = np.asarray(scale.step, np.float64)
    error = np.abs(np.asarray(decode(base, scale, axis=0, fine=fine), np.float64) - np.asarray(x))
    inside = np.asarray((base > 0) & (base < 15))  # ends may lie beyond the rounded range
    assert (error / step)[inside].max() <= 1 / 32 + 1e-3
    exact = np.asarray(x, np.float64).min(axis=0) / step
    assert np.abs(exact - np.asarray(scale.zero, np.float64)).max() > 0.25  # much to round
