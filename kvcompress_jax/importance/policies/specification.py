"""The specification's formula, literally."""

import dataclasses

import jax
import jax.numpy as jnp

from kvcompress_jax.importance.combine import ImportanceWeights, importance
from kvcompress_jax.importance.policies.base import LayerTokens, attention_mass, queries_that_see


@dataclasses.dataclass(frozen=True, kw_only=True)
class Specification:
    """`0.4 * magnitude + 0.4 * learned + 0.2 * attention`: tokens with larger norms, and tokens
    that receive more attention. Without a trained network the attention so far stands for the
    learned score, as in `kvcompress_jax.importance`.

    Attributes:
      weights: of the three.
    """

    weights: ImportanceWeights = ImportanceWeights()

    def scores(self, layer: LayerTokens, /) -> jax.Array:
        """f32[tokens, kv_heads]."""
        norm = jnp.sqrt(jnp.sum(layer.k**2, axis=-1) + jnp.sum(layer.v**2, axis=-1))
        mean = attention_mass(layer) / queries_that_see(layer)
        return importance(norm, None, mean, self.weights)

    def recent_tokens(self, budget_tokens: int, /) -> int:
        return 0
