"""The specification's decomposition: magnitude, direction, scale components, residual.

    x = magnitude * direction,   direction = synthesis of (components, residual)

The components are the coefficients of the direction in an orthonormal multi-resolution (Haar)
basis over the channels, the coarsest band first; the residual is the finest band.
"""

import dataclasses

import jax
import jax.numpy as jnp

FINEST_HALVINGS = 5  # 64 channels to a coarsest band of 2, 96 to one of 3


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class MultiScale:
    """Invariants: directions have norm 1 (0 for vectors of zeros), and so do components and
    residual together; `direction` is redundant with them, and kept because it is asked for."""

    magnitude: jax.Array  # f32[...]
    direction: jax.Array  # f32[..., dim]
    components: tuple[
        jax.Array, ...
    ]  # f32[..., dim / 2**k], f32[..., dim / 2**k], ..., coarse first
    residual: jax.Array  # f32[..., dim / 2]


def multi_scale_decompose(x: jax.Array, *, bands: int | None = None) -> MultiScale:
    """Decomposes vectors; exact to the rounding of float32.

    Args:
      x: bf16, f16 or f32 [..., dim], finite; any range.
      bands: how often the channels are halved; None: up to five times, as long as they are even.

    Raises:
      ValueError: `bands` is less than 1 or more than dim allows.
    """
    dim = x.shape[-1]
    possible = (dim & -dim).bit_length() - 1  # times that 2 divides dim
    bands = min(FINEST_HALVINGS, possible) if bands is None else bands
    if not 1 <= bands <= possible:
        raise ValueError(f"bands: expected 1 to {possible} for dim {dim}, got {bands}")
    x = x.astype(jnp.float32)
    # Scaled first: squares of large and small numbers leave the range of float32.
    largest = jnp.max(jnp.abs(x), axis=-1, keepdims=True)
    scaled = x / jnp.where(largest > 0, largest, 1.0)
    norm = jnp.linalg.norm(scaled, axis=-1, keepdims=True)
    direction = scaled / jnp.where(norm > 0, norm, 1.0)
    details, coarse = [], direction
    for _ in range(bands):
        even, odd = coarse[..., 0::2], coarse[..., 1::2]
        details.append((even - odd) * _HALF_ROOT)
        coarse = (even + odd) * _HALF_ROOT
    residual, *finer = details
    return MultiScale(
        magnitude=(norm * largest)[..., 0],
        direction=direction,
        components=(coarse, *reversed(finer)),
        residual=residual,
    )


def multi_scale_compose(parts: MultiScale) -> jax.Array:
    """The vectors that were decomposed, f32[..., dim], from all parts but the direction."""
    coarse, *details = (*parts.components, parts.residual)
    for detail in details:
        pairs = jnp.stack([coarse + detail, coarse - detail], axis=-1) * _HALF_ROOT
        coarse = pairs.reshape(*detail.shape[:-1], 2 * detail.shape[-1])
    return coarse * parts.magnitude[..., None]


_HALF_ROOT = 0.5**0.5
