"""Eviction: some tokens stay, the others are forgotten; what stays may be quantised."""

import dataclasses

import jax
import jax.numpy as jnp

from kvcompress_jax.importance.policies.base import Policy, keep_tokens
from kvcompress_jax.lab.methods.base import UNCOMPRESSED, Compressed, Context, Method


@dataclasses.dataclass(frozen=True, kw_only=True)
class Evict:
    """Keeps the same number of tokens in every head; each head chooses its own.

    Attributes:
      policy: that scores the tokens.
      keep_share: of all tokens, exact ones included, that stay; in (0, 1].
      then: compresses what stays. No positions are counted for keys that are stored after RoPE:
        attention needs none.
    """

    policy: Policy
    keep_share: float
    then: Method = UNCOMPRESSED

    def __post_init__(self) -> None:
        if not 0 < self.keep_share <= 1:
            raise ValueError(
                f"keep_share: expected more than 0 and at most 1, got {self.keep_share}"
            )

    def __call__(self, context: Context, /) -> Compressed:
        sinks, window = context.sinks, context.window
        kept = max(round(self.keep_share * context.tokens), sinks + window + 1)
        recent = min(max(window, self.policy.recent_tokens(kept)), kept - sinks)
        keep = jax.lax.map(
            lambda layer: keep_tokens(
                self.policy.scores(layer), budget_tokens=kept, sinks=sinks, recent_tokens=recent
            ),
            context.per_layer(),
        )  # [layers, tokens, kv_heads]
        # In order of position: the kept tokens first, then the others.
        index = jnp.argsort(~keep, axis=1, stable=True)[:, :kept].astype(jnp.int32)
        rest = dataclasses.replace(
            context,
            k=jnp.take_along_axis(context.k, index[..., None], axis=1),
            v=jnp.take_along_axis(context.v, index[..., None], axis=1),
            positions=jnp.take_along_axis(context.positions, index, axis=1),
            gathered=True,
        )
        compressed = self.then(rest)

        def scatter(x: jax.Array) -> jax.Array:
            # Place of each token among the kept ones; of a dropped token, anything.
            place = jnp.maximum(jnp.cumsum(keep.astype(jnp.int32), axis=1) - 1, 0)
            return jnp.where(keep[..., None], jnp.take_along_axis(x, place[..., None], axis=1), 0.0)

        stays = keep.swapaxes(1, 2)  # [layers, kv_heads, tokens]
        if compressed.keep is not None:
            stays = scatter(compressed.keep.swapaxes(1, 2)[..., None].astype(jnp.float32))
            stays = (stays[..., 0] > 0).swapaxes(1, 2)
        return Compressed(
            keys=scatter(compressed.keys),
            values=scatter(compressed.values),
            keep=stays,
            stored_bits=compressed.stored_bits,
        )
