"""What attention reads: pools, and which of their pages belong to which sequence."""

import dataclasses

import jax
import jax.numpy as jnp

from kvcompress_jax.kernels.pools import CodePools

MASKED = -1e30  # a logit; finite: the difference of two of them is 0, not NaN
# Weights are up to 2**6, not 1: with value steps of 1e-4 they stay normal float16 numbers.
LIFT = 6.0


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class AttentionPools:
    """The pools of a cache that attention reads, of all layers."""

    raw: jax.Array  # bf16 or f16[layers, raw_pages, 2, heads, page_size, dim]
    codes: CodePools
    fine_of: jax.Array  # i32[layers, pages], fine chunk of a page or -1
    sinks: jax.Array  # like raw: [layers, slots, 2, heads, sink_tokens, dim], exact first tokens

    @property
    def sink_tokens(self) -> int:
        """First tokens of a sequence that can be kept exactly; 0 without a slot for them."""
        return self.sinks.shape[4] if self.sinks.shape[1] else 0


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PageLists:
    """Pages of each sequence; entries past a row's count may hold anything.

    A page's index is its place in the sequence. Where `sink` is not -1, the sequence's first
    tokens are read from that slot, and the first slots of its sealed page 0 are not read.
    """

    sealed: jax.Array  # i32[sequences, max_sealed]
    sealed_index: jax.Array  # i32[sequences, max_sealed]
    sealed_count: jax.Array  # i32[sequences]
    raw: jax.Array  # i32[sequences, max_raw]
    raw_index: jax.Array  # i32[sequences, max_raw]
    raw_count: jax.Array  # i32[sequences]
    sink: jax.Array  # i32[sequences]
    length: jax.Array  # i32[sequences], tokens, those of the queries included


def refuse_dtypes(q: jax.Array, pools: AttentionPools) -> None:
    """Raises NotImplementedError for numbers that no kernel multiplies."""
    dtype = pools.raw.dtype
    if dtype not in (jnp.bfloat16, jnp.float16):
        raise NotImplementedError(f"raw: expected bfloat16 or float16, got {dtype}")
    if q.dtype != dtype:
        raise NotImplementedError(f"q: expected {dtype} like the raw pages, got {q.dtype}")


@dataclasses.dataclass(frozen=True)
class Groups:
    """Pages of one kind with those that are read first; fields i32[sequences, columns]."""

    ids: jax.Array
    index: jax.Array
    column: jax.Array  # where the page stands in the caller's list
    chunk: jax.Array  # fine chunk, -1: none
    counts: jax.Array  # i32[sequences, 2]: refined pages, which come first, and plain ones


def group_pages(
    ids: jax.Array,
    index: jax.Array,
    count: jax.Array,
    *,
    fine_of: jax.Array | None,
    page_size: int,
    oldest: jax.Array | None,
) -> Groups:
    """Sorts the pages of each sequence by level: a loop over pages of one level has no branch.

    Args:
      ids, index, count: of `PageLists`.
      fine_of: i32[pages] of the layer; None: no page is refined.
      page_size: tokens of a page.
      oldest: i32[sequences]: pages with only older tokens are left out. None: there are none.
    """
    columns = jnp.arange(ids.shape[1], dtype=jnp.int32)
    live = columns[None, :] < count[:, None]
    if oldest is not None:
        live = live & ((index + 1) * page_size > oldest[:, None])
    chunk = jnp.full(ids.shape, -1, jnp.int32)
    if fine_of is not None:
        chunk = jnp.where(live, fine_of[jnp.where(live, ids, 0)], -1)
    kind = jnp.where(live, jnp.where(chunk >= 0, 0, 1), 2)
    column = jnp.argsort(kind, axis=1, stable=True).astype(jnp.int32)

    def take(x: jax.Array) -> jax.Array:
        return jnp.take_along_axis(x, column, axis=1)

    counts = jnp.stack([jnp.sum(kind == k, axis=1, dtype=jnp.int32) for k in (0, 1)], axis=1)
    return Groups(take(ids), take(index), column, take(chunk), counts)
