"""Key norms: small keys matter."""

import dataclasses

import jax
import jax.numpy as jnp

from kvcompress_jax.importance.policies.base import LayerTokens


@dataclasses.dataclass(frozen=True, kw_only=True)
class KeyNorm:
    """Tokens whose keys have small norms (Devoto et al., "A Simple and Effective L2 Norm-Based
    Strategy for KV Cache Compression", 2024, arXiv:2406.11430).

    Attributes:
      high: large norms instead, the opposite of the paper.
    """

    high: bool = False

    def scores(self, layer: LayerTokens, /) -> jax.Array:
        """f32[tokens, kv_heads]."""
        norm = jnp.linalg.norm(layer.k, axis=-1)
        return norm if self.high else -norm

    def recent_tokens(self, budget_tokens: int, /) -> int:
        return 0
