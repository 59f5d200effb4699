"""What can be known of a token's importance: named scores, each f32[tokens, heads].

The specification mixes three. What each says on real models is in the README's table; the variant
that measures best with the specification's weights is the default.
"""

import dataclasses
from collections.abc import Callable
from typing import Protocol

import jax
import jax.numpy as jnp


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TokenStatistics:
    """What is known of the tokens of a page when it is sealed.

    `error` is the size of the error in the attention output that the token's 4-bit code causes,
    per unit of attention (`token_error`).
    """

    keys: jax.Array  # f32[tokens, heads, dim]
    values: jax.Array  # f32[tokens, heads, dim]
    mass: jax.Array  # f32[tokens, heads] attention received so far, summed over queries
    seen: jax.Array  # f32[tokens] queries that could see the token
    error: jax.Array  # f32[tokens, heads]


Score = Callable[[TokenStatistics], jax.Array]


class LearnedScore(Protocol):
    """A score with weights: a pytree whose leaves have a leading axis of layers, so that a page of
    all layers is scored under `jax.vmap`. `kvcompress_jax.importance.learned` has the trained one.
    """

    def __call__(self, statistics: TokenStatistics, where: jax.Array, /) -> jax.Array:
        """f32[tokens, heads] of one layer: the greater, the more attention the token will get.
        Tokens that `where` (bool[tokens, heads]) leaves out do not count."""
        ...


def token_error(key_error: jax.Array, value_error: jax.Array, values: jax.Array) -> jax.Array:
    """Size of the error in the attention output that a token's code causes, per unit of attention.

    For a query of unit variance, scaled by dim ** -0.5, the token's logit is off by about
    |key error| / sqrt(dim), which changes its weight by that factor and so the output by that much
    of its value; its value is off by |value error|.

    Args:
      key_error: f32[tokens, heads, dim].
      value_error: f32[tokens, heads, dim].
      values: f32[tokens, heads, dim].

    Returns:
      f32[tokens, heads].
    """
    logit = jnp.sqrt(_sum_of_squares(key_error) / key_error.shape[-1])
    return logit * jnp.linalg.norm(values, axis=-1) + jnp.sqrt(_sum_of_squares(value_error))


def _sum_of_squares(x: jax.Array) -> jax.Array:
    """Over the last axis, its halves first: XLA's fast reductions on CPUs do not reach through
    the split. They would draw in all that x is computed from, and compute it slowly."""
    low, high = jnp.split(x, [x.shape[-1] // 2], axis=-1)
    return jnp.sum(low**2 + high**2, axis=-1)


def attention_mean(s: TokenStatistics) -> jax.Array:
    """Attention per query that could see the token: the sum alone favours old tokens."""
    return s.mass / jnp.maximum(s.seen, 1.0)[:, None]


def attention_sum(s: TokenStatistics) -> jax.Array:
    """Attention received so far (H2O: Zhang et al., 2023)."""
    return s.mass


def key_norm(s: TokenStatistics) -> jax.Array:
    """Norm of the key. High norms get *less* attention on some models."""
    return jnp.linalg.norm(s.keys, axis=-1)


def inverse_key_norm(s: TokenStatistics) -> jax.Array:
    """Low key norms are important (Devoto et al., 2024)."""
    return -key_norm(s)


def value_norm(s: TokenStatistics) -> jax.Array:
    """Norm of the value."""
    return jnp.linalg.norm(s.values, axis=-1)


def specification(s: TokenStatistics) -> jax.Array:
    """ "Tokens with larger norms", literally: the norm of key and value together."""
    return jnp.sqrt(key_norm(s) ** 2 + value_norm(s) ** 2)


def quantization_error(s: TokenStatistics) -> jax.Array:
    """Magnitude of the error that the token would suffer at 4 bits."""
    return s.error


def output_error(s: TokenStatistics) -> jax.Array:
    """Magnitude of the error in the attention output: that of the token times the attention that
    the token gets."""
    return s.error * attention_mean(s)


MAGNITUDES: dict[str, Score] = {
    "specification": specification,
    "key_norm": key_norm,
    "inverse_key_norm": inverse_key_norm,
    "value_norm": value_norm,
    "quantization_error": quantization_error,
    "output_error": output_error,
}

ATTENTIONS: dict[str, Score] = {"mean": attention_mean, "sum": attention_sum}
