"""The next token of every request."""

import jax
import jax.numpy as jnp

NOT_FINITE = -1  # in the place of a token


@jax.jit
def sample(
    logits: jax.Array, temperature: jax.Array, seed: jax.Array, index: jax.Array
) -> jax.Array:
    """i32[n]: greedy where temperature is 0, else a draw that seed and index fix; NOT_FINITE where
    logits are not."""

    def one(logits: jax.Array, t: jax.Array, seed: jax.Array, index: jax.Array) -> jax.Array:
        key = jax.random.fold_in(jax.random.key(seed), index)
        drawn = jax.random.categorical(key, logits / jnp.where(t > 0, t, 1.0))
        token = jnp.where(t > 0, drawn, jnp.argmax(logits)).astype(jnp.int32)
        return jnp.where(jnp.all(jnp.isfinite(logits)), token, NOT_FINITE)

    return jax.vmap(one)(logits, temperature, seed, index)
