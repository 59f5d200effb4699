"""`hadamard`: rotates vectors by an orthonormal Hadamard matrix."""

import jax
import jax.numpy as jnp

from kvcompress_jax.kernels.dispatch import dispatch
from kvcompress_jax.kernels.hadamard.reference import hadamard_reference
from kvcompress_jax.kernels.hadamard.triton import hadamard_triton

IMPLEMENTATIONS = {"triton": hadamard_triton, "xla": hadamard_reference}


def hadamard(x: jax.Array, *, implementation: str | None = None) -> jax.Array:
    """x @ H, which spreads outlier channels evenly over all of them.

    Args:
      x: bf16, f16 or f32 [..., dim]; dim is 2 ** k, or 12 * 2 ** k as 96 is.
      implementation: None chooses; a name never falls back to another.

    Returns:
      x's shape and dtype; sums are float32.

    Raises:
      ValueError: another dtype, an unknown implementation.
      NotImplementedError: there is no matrix for dim, or the implementation that was named cannot
        do this.
    """
    if x.dtype not in (jnp.bfloat16, jnp.float16, jnp.float32):
        raise ValueError(f"x: expected bfloat16, float16 or float32, got {x.dtype}")
    return dispatch("hadamard", IMPLEMENTATIONS, implementation, x)
