"""The exact first tokens of sequences, for kernels that do not read them themselves."""

import jax
import jax.numpy as jnp

from kvcompress_jax.kernels.decode_attention.inputs import MASKED, AttentionPools, PageLists
from kvcompress_jax.kernels.decode_attention.queries import Tiled, Window


def sinks_share(
    pools: AttentionPools,
    lists: PageLists,
    layer: jax.Array | int,
    tiled: Tiled,
    window: Window | None,
    *,
    scale: float,
    cap: float | None,
) -> dict[str, jax.Array]:
    """Attention to the first tokens alone: a few tokens of each sequence, in plain JAX.

    Args:
      pools: with at least one sink token.
      lists, layer: of `decode_attention`.
      tiled: the queries.
      window: the sliding window.
      scale: of the logits, log2(e) included; cap: the soft cap, in the same units.

    Returns:
      first_top f32[sequences, kv_heads, columns], the greatest logit, of base 2; first_total,
      likewise, the sum of the weights relative to it; first_out f32[sequences, kv_heads, dim,
      columns], the sum of weighted values.
    """
    kv = pools.sinks[layer, jnp.maximum(lists.sink, 0)].astype(jnp.float32)
    token = jnp.arange(kv.shape[3], dtype=jnp.int32)[None, None, :, None]
    kept = (token < lists.length[:, None, None, None]) & (lists.sink >= 0)[:, None, None, None]
    keys, values = (jnp.where(kept, kv[:, kind], 0.0) for kind in (0, 1))
    position = tiled.position[:, None, None, :]
    seen = kept & (token <= position)
    if window is not None:
        seen = seen & ((window.span[0] <= 0) | (position - token < window.span[0]))
    # Sums of products, no matrix products: those would be calls of a library, and less exact.
    q = tiled.q.astype(jnp.float32) * scale
    s = jnp.sum(keys[:, :, :, None, :] * q[:, :, None, :, :], axis=-1)  # [.., tokens, columns]
    if cap is not None:
        s = cap * jnp.tanh(s / cap)
    s = jnp.where(seen, s, MASKED)
    top = jnp.max(s, axis=2)
    weights = jnp.where(seen, jnp.exp2(s - top[:, :, None, :]), 0.0)
    out = jnp.sum(values[..., None] * weights[:, :, :, None, :], axis=2)
    return {"first_top": top, "first_total": jnp.sum(weights, axis=2), "first_out": out}
