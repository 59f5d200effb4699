"""SnapKV: the end of the prompt says what matters."""

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax

from kvcompress_jax.importance.policies.base import LayerTokens, causal_weights


@dataclasses.dataclass(frozen=True, kw_only=True)
class SnapKV:
    """Tokens that the last queries look at, with their neighbours (Li et al., "SnapKV: LLM Knows
    What You are Looking for Before Generation", 2024, arXiv:2404.14469).

    Attributes:
      observed: newest tokens whose queries vote and that always stay.
      pooled: votes are averaged over this many neighbouring tokens; odd.
    """

    observed: int = 64
    pooled: int = 5

    def __post_init__(self) -> None:
        if self.observed < 1 or self.pooled < 1 or self.pooled % 2 == 0:
            raise ValueError(f"need observed >= 1 and an odd pooled >= 1, got {self}")

    def scores(self, layer: LayerTokens, /) -> jax.Array:
        """f32[tokens, kv_heads]."""
        first = max(0, layer.q.shape[0] - self.observed)
        weights = causal_weights(layer, first_query=first)
        votes = jnp.mean(weights, axis=(1, 2))  # [kv_heads, tokens]
        window, strides = (1, self.pooled), (1, 1)
        return lax.reduce_window(votes, 0.0, lax.add, window, strides, "SAME").T / self.pooled

    def recent_tokens(self, budget_tokens: int, /) -> int:
        return min(self.observed, budget_tokens)
