"""Mean-centring."""

import jax
import jax.numpy as jnp

from kvcompress_jax.transforms.base import Transform


def center() -> Transform:
    """Takes the mean over tokens away, per head and channel.

    To be done before any rotation: a rotation spreads a large common offset over all channels.
    """

    def init(x: jax.Array) -> jax.Array:
        return jnp.mean(x.astype(jnp.float32), axis=0, keepdims=True)

    def encode(mean: jax.Array, x: jax.Array) -> jax.Array:
        return x.astype(jnp.float32) - mean

    def decode(mean: jax.Array, y: jax.Array) -> jax.Array:
        return y.astype(jnp.float32) + mean

    return Transform(init, encode, decode)
