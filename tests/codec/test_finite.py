"""What cannot be coded is named."""

import jax.numpy as jnp
import pytest

from kvcompress_jax.codec import NonFiniteError, check_finite


def test_names_layer_head_and_page():
    pages = jnp.zeros((3, 2, 16, 64), jnp.bfloat16)
    check_finite("keys", pages, layer=7)
    bad = pages.at[2, 1, 5, :2].set(jnp.nan).at[2, 1, 5, 9].set(jnp.inf)
    message = "keys: expected finite values, got 3 that are not in layer 7, head 1, page 2"
    with pytest.raises(NonFiniteError, match=message):
        check_finite("keys", bad, layer=7)
