"""The specification's importance: a weighted sum of normalised scores, and its top-k."""

import dataclasses
import math

import jax
import jax.numpy as jnp

from kvcompress_jax.importance.scores import (
    ATTENTIONS,
    MAGNITUDES,
    LearnedScore,
    TokenStatistics,
)

COUNTED_TOKENS = 256  # up to so many tokens, comparing all pairs is faster than sorting


@dataclasses.dataclass(frozen=True, kw_only=True)
class ImportanceWeights:
    """Weights of the three scores; the defaults are the specification's."""

    magnitude: float = 0.4
    learned: float = 0.4
    attention: float = 0.2

    def __post_init__(self) -> None:
        values = dataclasses.astuple(self)
        if not all(math.isfinite(w) and w >= 0 for w in values) or not any(values):
            raise ValueError(
                "weights: expected finite numbers, none negative and not all zero, got"
                f" {dataclasses.asdict(self)}"
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class ImportanceRule:
    """How the importance of the tokens of a page is found. Hashable.

    Attributes:
      weights: of the three scores.
      magnitude: name of the magnitude score, of `MAGNITUDES`.
      attention: name of the attention score, of `ATTENTIONS`.
    """

    weights: ImportanceWeights = ImportanceWeights()
    magnitude: str = "output_error"
    attention: str = "mean"

    def __post_init__(self) -> None:
        for name, known in (("magnitude", MAGNITUDES), ("attention", ATTENTIONS)):
            if getattr(self, name) not in known:
                raise ValueError(
                    f"{name}: expected one of {list(known)}, got {getattr(self, name)!r}"
                )

    def __call__(
        self,
        statistics: TokenStatistics,
        *,
        learned: LearnedScore | None = None,
        where: jax.Array | None = None,
    ) -> jax.Array:
        """f32[tokens, heads]; tokens that `where` (bool[tokens, heads]) leaves out do not count."""
        predicted = None
        if learned is not None:
            everyone = jnp.ones(statistics.error.shape, bool)
            predicted = learned(statistics, everyone if where is None else where)
        return importance(
            MAGNITUDES[self.magnitude](statistics),
            predicted,
            ATTENTIONS[self.attention](statistics),
            self.weights,
            where=where,
        )


def normalize(score: jax.Array, *, where: jax.Array | None = None) -> jax.Array:
    """Min-max over tokens, per head: f32[tokens, heads] to [0, 1].

    A head whose scores are all equal, to the smallest normal number, gets 0.5 everywhere. Tokens
    that `where` (bool[tokens, heads]) leaves out do not count and get 0.
    """
    if where is None:
        where = jnp.ones(score.shape, bool)
    lo = jnp.min(score, axis=0, keepdims=True, where=where, initial=jnp.inf)
    hi = jnp.max(score, axis=0, keepdims=True, where=where, initial=-jnp.inf)
    # Halved first: hi - lo may overflow. What is left may be too small to divide by.
    extent = hi / 2 - lo / 2
    spread = extent > 0
    share = jnp.clip((score / 2 - lo / 2) / jnp.where(spread, extent, 1.0), 0.0, 1.0)
    return jnp.where(where, jnp.where(spread, share, 0.5), 0.0)


def importance(
    magnitude: jax.Array,
    learned: jax.Array | None,
    attention: jax.Array,
    weights: ImportanceWeights,
    *,
    where: jax.Array | None = None,
) -> jax.Array:
    """`0.4 * magnitude + 0.4 * learned + 0.2 * attention`, each normalised.

    The learned score predicts the attention that a token will get. Without one the best prediction
    that needs no learning takes its place: the attention that it got so far (the persistence of
    importance: Liu et al., 2023).

    Args:
      magnitude: f32[tokens, heads].
      learned: f32[tokens, heads], or None.
      attention: f32[tokens, heads].
      weights: of the three.
      where: bool[tokens, heads], tokens that count.

    Returns:
      f32[tokens, heads], in [0, sum of the weights].
    """
    got = normalize(attention, where=where)
    predicted = got if learned is None else normalize(learned, where=where)
    return (
        weights.magnitude * normalize(magnitude, where=where)
        + weights.learned * predicted
        + weights.attention * got
    )


def select_top_k(importance: jax.Array, ratio: float) -> jax.Array:
    """The most important tokens of each head.

    Args:
      importance: f32[tokens, heads].
      ratio: share to select; at least one token is.

    Returns:
      bool[tokens, heads], max(1, round(ratio * tokens)) True per head; of equals, the first.

    Raises:
      ValueError: ratio is not in (0, 1].
    """
    if not 0 < ratio <= 1:
        raise ValueError(f"ratio: expected more than 0 and at most 1, got {ratio}")
    tokens = importance.shape[0]
    rank = jnp.argsort(jnp.argsort(-importance, axis=0, stable=True), axis=0, stable=True)
    return rank < max(1, round(ratio * tokens))


def rank_tokens(importance: jax.Array, error: jax.Array) -> jax.Array:
    """Tokens in the order in which they deserve more bits: importance times the error that they
    would suffer without.

    Args:
      importance: f32[tokens, heads].
      error: f32[tokens, heads].

    Returns:
      i32[tokens, heads]: the best token of each head first; of equals, the earlier one; NaN last.
    """
    return jnp.argsort(-(importance * error), axis=0, stable=True).astype(jnp.int32)


def order_tokens(worth: jax.Array) -> jax.Array:
    """Stable descending argsort of f32[tokens, heads] along tokens: i32[tokens, heads]; NaN last.

    For the tokens of a page without a sort: a token's rank is the number of tokens that come
    before it. Comparing all pairs is quadratic work, but runs in parallel; XLA sorts on one thread
    of a CPU (measured: ten times the time for 64 tokens).

    `worth` must be in memory before: an argument or a constant of the program, exact integers, or
    the result of a loop, a condition or a sort. What XLA can compute again, fused into each of its
    readers, it may round differently there, and ranks against two versions of a number are no
    permutation. `rank_tokens` has no such condition.
    """
    if worth.shape[0] > COUNTED_TOKENS:
        return jnp.argsort(-worth, axis=0, stable=True).astype(jnp.int32)
    worth = jnp.where(jnp.isnan(worth), -jnp.inf, worth).T  # ranks must be a permutation
    token = jnp.arange(worth.shape[1], dtype=jnp.int32)
    mine, other = worth[:, :, None], worth[:, None, :]
    earlier = (token[None, :] < token[:, None])[None]
    rank = jnp.sum((other > mine) | ((other == mine) & earlier), axis=-1, dtype=jnp.int32)
    in_slot = rank[:, None, :] == token[None, :, None]  # [heads, slot, token]
    return jnp.sum(jnp.where(in_slot, token[None, None, :], 0), axis=-1, dtype=jnp.int32).T
