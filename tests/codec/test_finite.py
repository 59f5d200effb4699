"""What cannot be coded is named."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kvcompress_jax.codec import NonFiniteError, all_finite, check_finite


def test_names_layer_head_and_page():
    pages = jnp.zeros((3, 2, 16, 64), jnp.bfloat16)
    check_finite("keys", pages, layer=7)
    bad = pages.at[2, 1, 5, :2].set(jnp.nan).at[2, 1, 5, 9].set(jnp.inf)
    message = "keys: expected finite values, got 3 that are not in layer 7, head 1, page 2"
    with pytest.raises(NonFiniteError, match=message):
        check_finite("keys", bad, layer=7)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
def test_finds_every_infinity_and_nan_and_nothing_else(dtype):
    """Wherever it is, and whatever its sign; the largest number is no infinity."""
    find = jax.jit(all_finite)
    largest = float(jnp.finfo(dtype).max)
    pages = jnp.zeros((2, 3, 16, 8), dtype).at[0, 0].set(-largest).at[1, 2].set(largest)
    assert find(pages)
    for bad in (np.nan, -np.nan, np.inf, -np.inf):
        for where in ((0, 0, 0, 0), (1, 2, 15, 7), (0, 2, 7, 3)):
            assert not find(pages.at[where].set(bad)), (bad, where)
