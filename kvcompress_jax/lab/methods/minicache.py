"""MiniCache on the bench."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from kvcompress_jax.lab.methods.base import (
    POSITION_BITS,
    SCALE_BITS,
    UNCOMPRESSED,
    Compressed,
    Context,
    Method,
)
from kvcompress_jax.transforms.minicache import (
    MergedLayers,
    angular_distance,
    merge_layers,
    restore_layers,
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class MiniCache:
    """Pairs of neighbouring layers in the deeper half share directions; norms are kept, and tokens
    whose directions are far apart are not merged (Liu et al., 2024, arXiv:2405.14366; see
    `kvcompress_jax.transforms.minicache`). The paper merges across all heads of a token at once
    and retains what exceeds a threshold; here each head does so on its own, and the share that is
    retained is fixed, so that shapes are.

    Attributes:
      start_share: of the layers, the shallow ones, that are left alone; half in the paper.
      retained_share: of the tokens that are not merged, the most distant ones; 0.05 in the paper.
      t: place of the direction on the arc.
      then: compresses the layers that are left alone and the directions; one that looks at keys
        and values alone.
    """

    start_share: float = 0.5
    retained_share: float = 0.05
    t: float = 0.6
    then: Method = UNCOMPRESSED

    def __post_init__(self) -> None:
        if not 0 <= self.start_share <= 1:
            raise ValueError(f"start_share: expected 0 to 1, got {self.start_share}")
        if not 0 <= self.retained_share <= 1:
            raise ValueError(f"retained_share: expected 0 to 1, got {self.retained_share}")

    def __call__(self, context: Context, /) -> Compressed:
        layers = context.k.shape[0]
        start = round(self.start_share * layers)
        start += (layers - start) % 2  # the rest must pair up
        pairs = (layers - start) // 2
        retained = round(self.retained_share * context.coded_tokens)
        merged = [
            merge_layers(x[start::2], x[start + 1 :: 2], t=self.t) for x in (context.k, context.v)
        ]
        shared = dataclasses.replace(
            context,
            q=context.q[: start + pairs],
            k=jnp.concatenate([context.k[:start], merged[0].direction]),
            v=jnp.concatenate([context.v[:start], merged[1].direction]),
            positions=context.positions[: start + pairs],
        )
        stored = self.then(shared)
        keys, values = (
            _restore(whole, back, one, start=start, retained=retained, exact=context.exact)
            for whole, back, one in zip(
                (context.k, context.v), (stored.keys, stored.values), merged, strict=True
            )
        )
        heads, vector = context.k.shape[2], context.dim * context.exact_bits
        pair_bits = context.coded_tokens * 2 * SCALE_BITS  # norms
        pair_bits += retained * (2 * vector + POSITION_BITS)
        pair_bits += (context.tokens - context.coded_tokens) * vector  # exact in the second layer
        return Compressed(
            keys=keys,
            values=values,
            keep=None,
            stored_bits=stored.stored_bits + 2 * heads * pairs * pair_bits,
        )


def _restore(
    x: jax.Array,
    stored: jax.Array,
    merged: MergedLayers,
    *,
    start: int,
    retained: int,
    exact: np.ndarray,
) -> jax.Array:
    """f32[layers, tokens, heads, dim] from what is stored in place of `x`: the first `start`
    layers, then directions."""
    first, second = x[start::2], x[start + 1 :: 2]
    norms = (
        norm.astype(jnp.float16).astype(jnp.float32)
        for norm in (merged.first_norm, merged.second_norm)
    )
    one, other = restore_layers(MergedLayers(stored[start:], *norms))
    distance = angular_distance(first, second)  # [pairs, tokens, heads]
    exact_tokens = jnp.asarray(exact)[None, :, None]
    distance = jnp.where(exact_tokens, -1.0, distance)
    place = jnp.argsort(jnp.argsort(-distance, axis=1, stable=True), axis=1, stable=True)
    apart = ((place < retained) | exact_tokens)[..., None]
    pairs = jnp.stack([jnp.where(apart, first, one), jnp.where(apart, second, other)], axis=1)
    return jnp.concatenate([stored[:start], pairs.reshape(-1, *x.shape[1:])])
