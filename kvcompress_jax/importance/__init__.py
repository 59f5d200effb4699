"""Which tokens matter: scores, their mix, and the order in which tokens get bits."""

from kvcompress_jax.importance.combine import (
    ImportanceRule,
    ImportanceWeights,
    importance,
    normalize,
    rank_tokens,
    select_top_k,
)
from kvcompress_jax.importance.scores import (
    ATTENTIONS,
    MAGNITUDES,
    LearnedScore,
    Score,
    TokenStatistics,
    token_error,
)

__all__ = [
    "ATTENTIONS",
    "MAGNITUDES",
    "ImportanceRule",
    "ImportanceWeights",
    "LearnedScore",
    "Score",
    "TokenStatistics",
    "importance",
    "normalize",
    "rank_tokens",
    "select_top_k",
    "token_error",
]
