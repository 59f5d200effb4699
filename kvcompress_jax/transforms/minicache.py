"""MiniCache: two neighbouring layers share the directions of their vectors.

    x_1, x_2  ->  shared direction e, norms |x_1|, |x_2|
    back          |x_1| e, |x_2| e

e lies on the arc between the directions of x_1 and x_2 (spherical interpolation: Shoemake, 1985).
Liu et al., "MiniCache: KV Cache Compression in Depth Dimension for Large Language Models", 2024,
arXiv:2405.14366.
"""

import dataclasses

import jax
import jax.numpy as jnp

SMALLEST_SINE = 1e-4  # of the angle; below it the arc is a line


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class MergedLayers:
    """Two layers' vectors. Invariant: directions have norm 1, or 0 where both vectors are zeros."""

    direction: jax.Array  # f32[..., dim]
    first_norm: jax.Array  # f32[...]
    second_norm: jax.Array  # f32[...]


def merge_layers(first: jax.Array, second: jax.Array, *, t: float = 0.6) -> MergedLayers:
    """Merges vectors of two layers.

    Args:
      first: floating [..., dim], of the shallower layer.
      second: like first, of the deeper layer.
      t: place on the arc: 0 is the direction of `first`, 1 that of `second`; 0.6 in the paper.

    Raises:
      ValueError: t is not in [0, 1].
    """
    if not 0 <= t <= 1:
        raise ValueError(f"t: expected 0 to 1, got {t}")
    first, second = first.astype(jnp.float32), second.astype(jnp.float32)
    norms = jnp.linalg.norm(first, axis=-1), jnp.linalg.norm(second, axis=-1)
    a, b = (
        x / jnp.where(norm > 0, norm, 1.0)[..., None]
        for x, norm in zip((first, second), norms, strict=True)
    )
    angle = angular_distance(first, second)[..., None] * jnp.pi
    sine = jnp.sin(angle)
    round_ = sine > SMALLEST_SINE
    divisor = jnp.where(round_, sine, 1.0)
    weight_a = jnp.where(round_, jnp.sin((1 - t) * angle) / divisor, 1 - t)
    weight_b = jnp.where(round_, jnp.sin(t * angle) / divisor, t)
    between = weight_a * a + weight_b * b
    norm = jnp.linalg.norm(between, axis=-1, keepdims=True)
    direction = between / jnp.where(norm > 0, norm, 1.0)
    return MergedLayers(direction=direction, first_norm=norms[0], second_norm=norms[1])


def restore_layers(merged: MergedLayers) -> tuple[jax.Array, jax.Array]:
    """Vectors of both layers, f32[..., dim]."""
    return (
        merged.direction * merged.first_norm[..., None],
        merged.direction * merged.second_norm[..., None],
    )


def angular_distance(first: jax.Array, second: jax.Array) -> jax.Array:
    """Angle over pi, f32[...] in [0, 1]; 1/2 where a vector is zero."""
    first, second = first.astype(jnp.float32), second.astype(jnp.float32)
    norms = jnp.linalg.norm(first, axis=-1) * jnp.linalg.norm(second, axis=-1)
    cosine = jnp.sum(first * second, axis=-1) / jnp.where(norms > 0, norms, 1.0)
    return jnp.arccos(jnp.clip(cosine, -1.0, 1.0)) / jnp.pi
