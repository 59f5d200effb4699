"""Rotary position embedding."""

import math

import jax
import jax.numpy as jnp
import numpy as np

from kvcompress_jax.models.config import (
    DecoderConfig,
    FrequencyDivisors,
    LinearScaling,
    Llama3Scaling,
    Rope,
)


def frequencies(rope: Rope, head_dim: int) -> np.ndarray:
    """Angle per position of each pair of channels.

    Args:
      rope: base and scaling.
      head_dim: even.

    Returns:
      f32[head_dim / 2].
    """
    exponents = np.arange(0, head_dim, 2, dtype=np.float64) / head_dim
    plain = rope.theta**-exponents
    match rope.scaling:
        case None:
            scaled = plain
        case LinearScaling(factor=factor):
            scaled = plain / factor
        case FrequencyDivisors(divisors=divisors):
            scaled = plain / np.asarray(divisors)
        case Llama3Scaling() as scaling:
            turns = scaling.original_max_positions * plain / (2 * math.pi)
            low, high = scaling.low_frequency_factor, scaling.high_frequency_factor
            keep = np.clip((turns - low) / (high - low), 0, 1)
            scaled = plain * (keep + (1 - keep) / scaling.factor)
    return scaled.astype(np.float32)


def layer_frequencies(config: DecoderConfig) -> jax.Array:
    """f32[layers, head_dim / 2]: the angles per position of each layer's RoPE."""
    ropes = [config.rope] if config.local_rope is None else [config.rope, config.local_rope]
    tables = [frequencies(rope, config.head_dim) for rope in ropes]
    return jnp.stack([jnp.asarray(tables[min(w, len(tables) - 1)]) for w in config.layer_windows])


def rope_table(rope: Rope, head_dim: int, positions: jax.Array) -> jax.Array:
    """Cosines and sines of the angles of each token.

    Args:
      rope: base and scaling.
      head_dim: even.
      positions: i32[tokens].

    Returns:
      f32[2, tokens, head_dim / 2]: cosines, sines.
    """
    angles = positions.astype(jnp.float32)[:, None] * frequencies(rope, head_dim)[None, :]
    return jnp.stack([jnp.cos(angles), jnp.sin(angles)])


def rotate(x: jax.Array, table: jax.Array) -> jax.Array:
    """Rotates channels d and d + dim / 2 of every head by the angle of the token.

    Args:
      x: [tokens, heads, dim].
      table: f32[2, tokens, dim / 2], of `rope_table`.

    Returns:
      Like `x`; computed in float32.
    """
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    cos, sin = table[0][:, None, :], table[1][:, None, :]
    turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return turned.astype(x.dtype)


def turn_back(x: jax.Array, frequency: jax.Array) -> jax.Array:
    """What `rotate` got for the tokens of positions 0 and on.

    Args:
      x: [tokens, heads, dim].
      frequency: f32[dim / 2], angles per position.

    Returns:
      Like `x`; computed in float32.
    """
    position = jnp.arange(x.shape[0], dtype=jnp.int32).astype(jnp.float32)
    angles = position[:, None] * frequency[None, :]
    return rotate(x, jnp.stack([jnp.cos(angles), -jnp.sin(angles)]))
