"""H2O: heavy hitters and recent tokens."""

import dataclasses

import jax

from kvcompress_jax.importance.policies.base import LayerTokens, attention_mass


@dataclasses.dataclass(frozen=True, kw_only=True)
class H2O:
    """Tokens with the most attention so far, and the newest ones (Zhang et al., "H2O: Heavy-Hitter
    Oracle for Efficient Generative Inference of Large Language Models", 2023, arXiv:2306.14048).

    Attributes:
      recent_share: of the budget that goes to the newest tokens; half in the paper.
    """

    recent_share: float = 0.5

    def __post_init__(self) -> None:
        if not 0 <= self.recent_share <= 1:
            raise ValueError(f"recent_share: expected 0 to 1, got {self.recent_share}")

    def scores(self, layer: LayerTokens, /) -> jax.Array:
        """f32[tokens, kv_heads]: the sum, as in the paper; it favours old tokens."""
        return attention_mass(layer)

    def recent_tokens(self, budget_tokens: int, /) -> int:
        return int(self.recent_share * budget_tokens)
