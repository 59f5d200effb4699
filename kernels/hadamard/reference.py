"""`hadamard` in plain XLA: what the kernel must do, up to rounding."""

import jax
import jax.numpy as jnp
from jax import lax

from kvcompress_jax.kernels.hadamard.matrix import signs


def hadamard_reference(x: jax.Array) -> jax.Array:
    """See `kvcompress_jax.kernels.hadamard.hadamard`."""
    dim = x.shape[-1]
    y = jnp.matmul(
        x.astype(jnp.float32),
        jnp.asarray(signs(dim), jnp.float32),
        precision=lax.Precision.HIGHEST,
    )
    return (y * dim**-0.5).astype(x.dtype)
