"""Raw pages as integers, where XLA would move bfloat16 by way of float32.

On a CPU, JAX before 0.12 gathers from and scatters to a pool of bfloat16 by converting all of it to
float32 and back, for every layer. Integers of the same width move as they are. A step therefore
takes the raw pool as integers from its beginning to its end (two copies of the pool instead of two
per layer), and reads and writes through `from_pool` and `to_pool`, which do nothing elsewhere.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax

from kvcompress_jax.paged.cache import PagedCache


def hold_bits(cache: PagedCache) -> PagedCache:
    """The cache with its raw pool as uint16, on devices that need it; else the same cache."""
    return dataclasses.replace(cache, raw=bits(cache.raw))


def release_bits(cache: PagedCache) -> PagedCache:
    """Undoes `hold_bits`."""
    return dataclasses.replace(cache, raw=from_pool(cache.raw, cache.layout.jax_dtype))


def bits(pool: jax.Array) -> jax.Array:
    """A pool as uint16 where it is bfloat16 and that does not move as it is; else the same pool."""
    moves = jax.default_backend() != "cpu" or jax.__version_info__ >= (0, 12)
    if pool.dtype != jnp.bfloat16 or moves:
        return pool
    return lax.bitcast_convert_type(pool, jnp.uint16)


def from_pool(x: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """What was read from a raw pool, in its own dtype."""
    return x if x.dtype == dtype else lax.bitcast_convert_type(x, dtype)


def to_pool(x: jax.Array, pool: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """Numbers, rounded to `dtype`, as the pool that holds that dtype takes them."""
    x = x.astype(dtype)
    return x if pool.dtype == dtype else lax.bitcast_convert_type(x, pool.dtype)
