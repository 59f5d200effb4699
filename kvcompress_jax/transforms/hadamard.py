"""Hadamard rotations: they spread outlier channels evenly over all of them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from kvcompress_jax.codec.hadamard import hadamard_matrix
from kvcompress_jax.transforms.base import State, Transform


def rotate(dim: int, *, seed: int | None = None) -> Transform:
    """Rotates vectors by a Hadamard matrix.

    Rotating keys and queries alike leaves attention as it is.

    Args:
      dim: of the vectors; see `hadamard_matrix`.
      seed: of random signs given to the channels first; None: none.

    Raises:
      ValueError: there is no matrix for `dim`.
    """
    matrix = hadamard_matrix(dim)
    if seed is not None:
        matrix = np.random.default_rng(seed).choice([-1.0, 1.0], dim)[:, None] * matrix
    matrix = matrix.astype(np.float32)
    multiply = functools.partial(jnp.matmul, precision=lax.Precision.HIGHEST)

    def init(x: jax.Array) -> State:
        if x.shape[-1] != dim:
            raise ValueError(f"x: expected [..., {dim}], got {list(x.shape)}")
        return ()

    def encode(state: State, x: jax.Array) -> jax.Array:
        return multiply(x.astype(jnp.float32), matrix)

    def decode(state: State, y: jax.Array) -> jax.Array:
        return multiply(y.astype(jnp.float32), matrix.T)

    return Transform(init, encode, decode)
