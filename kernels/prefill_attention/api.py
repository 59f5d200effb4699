"""`prefill_attention`: a chunk's queries attend to compressed pages and to the chunk itself."""

import functools

import jax

from kvcompress_jax.kernels.decode_attention.api import check
from kvcompress_jax.kernels.decode_attention.inputs import AttentionPools, PageLists
from kvcompress_jax.kernels.decode_attention.reference import attention_reference
from kvcompress_jax.kernels.decode_attention.triton import attention_triton
from kvcompress_jax.kernels.dispatch import dispatch

IMPLEMENTATIONS = {
    "triton": functools.partial(attention_triton, op="prefill_attention"),
    "xla": attention_reference,
}


def prefill_attention(
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
    """`decode_attention` for any number of queries: the same contract, with wide tiles of queries.

    The chunk's own keys and values are in raw pages already; a query sees as far as it stands.
    """
    check(q, pools, lists)
    return dispatch(
        "prefill_attention",
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
