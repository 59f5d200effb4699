"""Random tokens: what any policy must beat."""

import dataclasses

import jax

from kvcompress_jax.importance.policies.base import LayerTokens


@dataclasses.dataclass(frozen=True, kw_only=True)
class Random:
    """A draw for each layer, head and token.

    Attributes:
      seed: of the draw.
    """

    seed: int = 0

    def scores(self, layer: LayerTokens, /) -> jax.Array:
        """f32[tokens, kv_heads], uniform in [0, 1)."""
        key = jax.random.fold_in(jax.random.key(self.seed), layer.index)
        return jax.random.uniform(key, layer.k.shape[:2])

    def recent_tokens(self, budget_tokens: int, /) -> int:
        return 0
