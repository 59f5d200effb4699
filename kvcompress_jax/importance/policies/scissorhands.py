"""Scissorhands: what was important lately stays important."""

import dataclasses

import jax
import jax.numpy as jnp

from kvcompress_jax.importance.policies.base import LayerTokens, causal_weights


@dataclasses.dataclass(frozen=True, kw_only=True)
class Scissorhands:
    """Tokens that were looked at more than average most often in a history window (Liu et al.,
    "Scissorhands: Exploiting the Persistence of Importance Hypothesis for LLM KV Cache Compression
    at Test Time", 2023, arXiv:2305.17118, algorithm 2: importance is counted, not summed).

    Attributes:
      history_tokens: newest queries that count; the paper has 400.
      recent: newest tokens that always stay; the paper has 10.
    """

    history_tokens: int = 400
    recent: int = 10

    def __post_init__(self) -> None:
        if self.history_tokens < 1 or self.recent < 0:
            raise ValueError(f"need history_tokens >= 1 and recent >= 0, got {self}")

    def scores(self, layer: LayerTokens, /) -> jax.Array:
        """f32[tokens, kv_heads]: queries to which the token was important, over all heads of the
        group; of tokens with equal counts the one with more attention."""
        queries = layer.q.shape[0]
        first = max(0, queries - self.history_tokens)
        weights = causal_weights(layer, first_query=first)
        average = 1 / (1 + first + jnp.arange(queries - first, dtype=jnp.float32))
        pivotal = weights > average[None, None, :, None]
        count = jnp.sum(pivotal.astype(jnp.float32), axis=(1, 2))
        share = jnp.sum(weights, axis=(1, 2)) / (weights.shape[1] * (queries - first) + 1)
        return (count + share).T  # share < 1: it only breaks ties

    def recent_tokens(self, budget_tokens: int, /) -> int:
        return min(self.recent, budget_tokens)
