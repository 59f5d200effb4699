"""Attention over the paged cache: the public operation and its contract."""

import dataclasses
import functools
from typing import Protocol

import jax
import jax.numpy as jnp

from kvcompress_jax.kernels.dispatch import dispatch
from kvcompress_jax.paged.attention_kernels import attend_kernels
from kvcompress_jax.paged.attention_xla import attend_xla
from kvcompress_jax.paged.cache import PagedCache
from kvcompress_jax.paged.table import PageTable


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class AttentionMass:
    """Softmax weight that the queries of one call gave, summed over queries and the query heads
    of a KV head. Exact first tokens (sinks) are left out: nothing is ever decided about them."""

    sealed: jax.Array  # f32[sequences, kv_heads, max_sealed] per page of the table
    raw: jax.Array  # f32[sequences, kv_heads, max_raw, page_size] per token


class Implementation(Protocol):
    """An implementation of `attend`: its inputs are checked, its options resolved."""

    def __call__(
        self,
        q: jax.Array,
        cache: PagedCache,
        layer: jax.Array | int,
        table: PageTable,
        *,
        query_lengths: jax.Array,
        scale: float,
        window: jax.Array | int | None,
        soft_cap: float | None,
        return_mass: bool,
    ) -> tuple[jax.Array, jax.Array, tuple[jax.Array, jax.Array] | None]: ...


# The first that can is taken. Which one runs, `dispatch` decides.
IMPLEMENTATIONS: dict[str, Implementation] = {
    "triton": functools.partial(attend_kernels, implementation="triton"),
    "mosaic_gpu": functools.partial(attend_kernels, implementation="mosaic_gpu"),
    "cpu": functools.partial(attend_kernels, implementation="cpu"),
    "xla": attend_xla,
}


def attend(
    q: jax.Array,
    cache: PagedCache,
    layer: jax.Array | int,
    table: PageTable,
    *,
    query_lengths: jax.Array | None = None,
    scale: float | None = None,
    window: jax.Array | int | None = None,
    soft_cap: float | None = None,
    return_mass: bool = False,
    implementation: str | None = None,
) -> tuple[jax.Array, jax.Array, AttentionMass | None]:
    """Causal attention of the newest tokens of each sequence to all of its cached tokens.

    The keys and values of the queries' own tokens are in the cache already (`append` comes
    first). Decode is one query a sequence, chunked prefill is many, a mixed batch is ragged:
    `query_lengths` says how many of each row's queries are real. Compressed pages are decoded
    block by block inside an online softmax (Milakov and Gimelshein, 2018); the cache is never
    decoded as a whole.

    Args:
      q: floating [sequences, queries, heads, dim], after RoPE, not scaled.
      cache: the paged cache.
      layer: i32[].
      table: pages of the sequences; `table.length` counts the queries' tokens too.
      query_lengths: i32[sequences]: the first so many queries of a row are real, and are the last
        so many tokens of the sequence. None: all are.
      scale: factor of the logits; None: dim ** -0.5.
      window: sliding window in tokens, i32[] or int: a query sees the keys fewer than `window`
        positions back, itself included; 0 sees everything. None: no window, and no code for one.
      soft_cap: logits become `soft_cap * tanh(logits / soft_cap)`.
      return_mass: also return what each page and raw token received, from the same pass.
      implementation: "triton" (GPU kernels), "mosaic_gpu" (a GPU kernel for decode steps on sm_90
        and newer, JAX 0.12 and newer), "cpu" (a kernel for CPUs, of few queries), "xla" (any
        device), or None: the first of them that can do it here. A name never falls back to another.

    Returns:
      out: q's shape and dtype; zeros for queries that are not real. NaN that a query sees is in
        its result, and what it gives to tokens is not counted.
      lse: f32[sequences, queries, heads], natural log of the sum of exponentials; -inf for
        queries that are not real.
      mass: `AttentionMass`, or None.

    Raises:
      ValueError: shapes that do not belong together, or an implementation that does not exist.
      NotImplementedError: the implementation that was named cannot do this.
    """
    layout = cache.layout
    if q.ndim != 4 or q.shape[3] != layout.head_dim or q.shape[2] % layout.kv_heads:
        raise ValueError(
            f"q: expected [sequences, queries, multiple of {layout.kv_heads},"
            f" {layout.head_dim}], got {list(q.shape)}"
        )
    if table.length.shape[0] != q.shape[0]:
        raise ValueError(
            f"table: expected {q.shape[0]} sequences (rows of q), got {table.length.shape[0]}"
        )
    if query_lengths is None:
        query_lengths = jnp.full((q.shape[0],), q.shape[1], jnp.int32)
    out, lse, mass = dispatch(
        "attend",
        IMPLEMENTATIONS,
        implementation,
        q,
        cache,
        layer,
        table,
        query_lengths=query_lengths,
        scale=layout.head_dim**-0.5 if scale is None else scale,
        window=window,
        soft_cap=soft_cap,
        return_mass=return_mass,
    )
    return out, lse, None if mass is None else AttentionMass(*mass)
