"""StreamingLLM: sinks and a sliding window."""

import dataclasses

import jax
import jax.numpy as jnp

from kvcompress_jax.importance.policies.base import LayerTokens


@dataclasses.dataclass(frozen=True, kw_only=True)
class Streaming:
    """The first and the newest tokens (Xiao et al., "Efficient Streaming Language Models with
    Attention Sinks", 2023, arXiv:2309.17453). The sinks are those of the context, 4 in the paper.
    Positions stay what they were: the paper's renumbering is for texts beyond the model's range.
    """

    def scores(self, layer: LayerTokens, /) -> jax.Array:
        """f32[tokens, kv_heads]: newer is better."""
        return layer.positions.astype(jnp.float32)

    def recent_tokens(self, budget_tokens: int, /) -> int:
        return 0  # the scores say it
