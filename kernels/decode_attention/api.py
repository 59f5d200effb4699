"""`decode_attention`: the newest tokens of sequences attend to compressed pages."""

import jax

from kvcompress_jax.kernels.decode_attention.cpu import attention_cpu
from kvcompress_jax.kernels.decode_attention.inputs import AttentionPools, PageLists
from kvcompress_jax.kernels.decode_attention.mosaic import attention_mosaic
from kvcompress_jax.kernels.decode_attention.reference import attention_reference
from kvcompress_jax.kernels.decode_attention.triton import attention_triton
from kvcompress_jax.kernels.dispatch import dispatch

IMPLEMENTATIONS = {
    "triton": attention_triton,
    "mosaic_gpu": attention_mosaic,
    "cpu": attention_cpu,
    "xla": attention_reference,
}


def decode_attention(
    q: jax.Array,
    pools: AttentionPools,
    layer: jax.Array | int,
    lists: PageLists,
    *,
    query_lengths: jax.Array,
    scale: float,
    window: jax.Array | int | None = None,
    soft_cap: float | None = None,
    return_mass: bool = False,
    implementation: str | None = None,
) -> tuple[jax.Array, jax.Array, tuple[jax.Array, jax.Array] | None]:
    """Causal attention to raw, refined and coarse pages, one softmax over all of them.

    Args:
      q: bf16 or f16[sequences, queries, heads, dim] like the raw pages, or f32 (Triton's kernel
        rounds them for raw pages), after RoPE, not scaled: the last `query_lengths` tokens of each
        sequence, whose keys and values are in the cache.
      pools: of the cache.
      layer: i32[].
      lists: pages of the sequences.
      query_lengths: i32[sequences]: the first so many queries of a row are real.
      scale: factor of the logits.
      window: a query sees the keys fewer than so many positions back, itself included; 0 sees
        everything. None: no window, and no code for one.
      soft_cap: logits become `soft_cap * tanh(logits / soft_cap)`.
      return_mass: also return the weights that pages received, from the same pass.
      implementation: None chooses; a name never falls back to another.

    Returns:
      out: q's shape and dtype; zeros for queries that are not real. NaN that a query sees is in
        its result, and what it gives to tokens is not counted.
      lse: f32[sequences, queries, heads], natural log of the sum of exponentials, -inf likewise.
      mass: None, or f32[sequences, kv_heads, max_sealed] of each sealed page and f32[sequences,
        kv_heads, max_raw, page_size] of each raw token, summed over queries and the query heads of
        a KV head; exact first tokens are left out.

    Raises:
      ValueError: shapes that do not belong together, an unknown implementation.
      NotImplementedError: the implementation that was named cannot do this.
    """
    check(q, pools, lists)
    return dispatch(
        "decode_attention",
        IMPLEMENTATIONS,
        implementation,
        q,
        pools,
        layer,
        lists,
        query_lengths=query_lengths,
        scale=scale,
        window=window,
        soft_cap=soft_cap,
        return_mass=return_mass,
    )


def check(q: jax.Array, pools: AttentionPools, lists: PageLists) -> None:
    """Raises ValueError for shapes that do not belong together."""
    heads, _, dim = pools.raw.shape[3:]
    if q.ndim != 4 or q.shape[3] != dim or q.shape[2] % heads:
        raise ValueError(
            f"q: expected [sequences, queries, multiple of {heads}, {dim}], got {list(q.shape)}"
        )
    if lists.length.shape[0] != q.shape[0]:
        raise ValueError(
            f"lists: expected {q.shape[0]} sequences (rows of q), got {lists.length.shape[0]}"
        )
