"""What attention reads: pools, and which of their pages belong to which sequence."""

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax

from kvcompress_jax.kernels.pools import CodePools

MASKED = -1e30  # a logit; finite: the difference of two of them is 0, not NaN
# Weights are up to 2**6, not 1: with value steps of 1e-4 they stay normal float16 numbers.
LIFT = 6.0
LN2 = 0.6931471805599453


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
    # Whether sealed pages with a fine chunk come before those without, in the layer attended to.
    by_level: bool = dataclasses.field(default=False, metadata={"static": True})


def refuse_dtypes(q: jax.Array, pools: AttentionPools, *, float32: bool) -> None:
    """Raises NotImplementedError for numbers that no kernel multiplies.

    `float32`: whether queries may be float32 beside shorter keys.
    """
    dtype = pools.raw.dtype
    if dtype not in (jnp.bfloat16, jnp.float16):
        raise NotImplementedError(f"raw: expected bfloat16 or float16, got {dtype}")
    if q.dtype != dtype and not (float32 and q.dtype == jnp.float32):
        wanted = f"{dtype} like the raw pages" + (" or float32" if float32 else "")
        raise NotImplementedError(f"q: expected {wanted}, got {q.dtype}")


@dataclasses.dataclass(frozen=True)
class Groups:
    """Pages of one kind in the order in which they are read."""

    ids: jax.Array  # i32[sequences, columns]
    index: jax.Array  # likewise
    column: jax.Array  # likewise: where the page stands in the caller's list
    chunk: jax.Array | None  # likewise, fine chunk; refined pages come first. None: no page has one
    refined: jax.Array | None  # i32[sequences]: so many
    plain: jax.Array  # i32[sequences]: pages without a fine chunk, which come next
    read: jax.Array  # bool[sequences, columns], in the caller's order


def group_pages(
    ids: jax.Array,
    index: jax.Array,
    count: jax.Array,
    *,
    fine_of: jax.Array | None,
    page_size: int,
    oldest: jax.Array | None,
    by_level: bool,
) -> Groups:
    """Sorts the pages of each sequence by level: a loop over pages of one level has no branch.
    Where they are in order already and none is left out, they stay as they are.

    Args:
      ids, index, count: of `PageLists`.
      fine_of: i32[pages] of the layer; None: no page is refined.
      page_size: tokens of a page.
      oldest: i32[sequences]: pages with only older tokens are left out. None: there are none.
      by_level: of `PageLists`. Should it not be true, pages out of order are read without their
        fine chunks.
    """
    column = jnp.broadcast_to(jnp.arange(ids.shape[1], dtype=jnp.int32)[None, :], ids.shape)
    read = column < count[:, None]
    if oldest is None and fine_of is None:
        return Groups(ids, index, column, chunk=None, refined=None, plain=count, read=read)
    if oldest is not None:
        read = read & ((index + 1) * page_size > oldest[:, None])
    kind = jnp.where(read, 1, 2)
    pages = [ids, index, column]
    if fine_of is not None:
        chunk = jnp.where(read, fine_of[jnp.where(read, ids, 0)], -1)
        if by_level and oldest is None:
            refined = jnp.min(jnp.where(chunk < 0, column, ids.shape[1]), axis=1)
            return Groups(ids, index, column, chunk, refined, plain=count - refined, read=read)
        kind = jnp.where(chunk >= 0, 0, kind)
        pages.append(chunk)
    _, ids, index, column, *chunks = lax.sort((kind, *pages), num_keys=1, is_stable=True)
    refined, plain = (jnp.sum(kind == k, axis=1, dtype=jnp.int32) for k in (0, 1))
    if not chunks:
        return Groups(ids, index, column, chunk=None, refined=None, plain=plain, read=read)
    return Groups(ids, index, column, chunks[0], refined, plain, read)
