"""`attend` in plain XLA: any device, bounded memory. The reference for the kernels.

Three loops share one online softmax: sealed pages, the exact first tokens, raw pages. Each takes
a block of pages at a time and runs only as often as the longest row needs.
"""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

from kvcompress_jax.kernels.decode_attention.queries import tile_queries, untile_queries
from kvcompress_jax.paged.cache import PagedCache
from kvcompress_jax.paged.heads import HeadSplit, head_by_head
from kvcompress_jax.paged.layout import CacheLayout
from kvcompress_jax.paged.products import KeyValueBlock, block_of
from kvcompress_jax.paged.raw_bits import bits, from_pool
from kvcompress_jax.paged.read import decode_block, slot_tokens
from kvcompress_jax.paged.table import PageTable

# Numbers that the keys of one block hold. On a CPU what a block needs should stay in the caches of
# a core: with half a MiB of float32 keys decode takes half the time that it takes with 4 MiB. Other
# devices pay for every pass of a loop.
BLOCK_NUMBERS = 1 << 23
BLOCK_NUMBERS_CPU, MOST_NUMBERS_CPU = 1 << 17, 1 << 20
# Of its logits. With more, XLA asks the allocator for more than 32 MiB, which the C library returns
# to the system at once: every call gets new memory, at twice the time.
MOST_LOGITS_CPU = 5 << 18
# A pass reads and writes the running sums; with many queries they are larger than such a block.
BLOCKS_PER_STATE = 4
MASKED = -1e30  # finite: the difference of two of them is 0, not NaN


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Softmax:
    """Running state of the online softmax."""

    top: jax.Array  # f32[rows, heads, n] greatest logit so far
    total: jax.Array  # f32[rows, heads, n] sum of exp(logit - top)
    out: jax.Array  # f32[rows, heads, n, dim] weighted sum of values, unnormalised
    split: HeadSplit | None = dataclasses.field(metadata={"static": True})

    def add(self, logits: jax.Array, mask: jax.Array, block: KeyValueBlock) -> "_Softmax":
        """Adds a block with logits [rows, heads, n, pages, tokens] and a mask that broadcasts to
        them."""
        logits = jnp.where(mask, logits, MASKED)
        top = jnp.maximum(self.top, jnp.max(logits, axis=(3, 4)))
        weights = jnp.where(mask, jnp.exp(logits - top[..., None, None]), 0.0)
        shrink = jnp.exp(self.top - top)
        return _Softmax(
            top=top,
            total=self.total * shrink + _sum(self.split, weights, (3, 4)),
            out=self.out * shrink[..., None] + block.weighted_sum(weights),
            split=self.split,
        )


def attend_xla(
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
    block_pages: int | None = None,
) -> tuple[jax.Array, jax.Array, tuple[jax.Array, jax.Array] | None]:
    """See `kvcompress_jax.paged.attention.attend`; `n` below is queries x heads per KV head.

    `block_pages`: pages of each sequence that one pass of a loop takes; None: what is best on the
    default device (`pages_at_once`).
    """
    rows, queries, all_heads, dim = q.shape
    layout = cache.layout
    heads, page_size = layout.kv_heads, layout.page_size
    group = all_heads // heads
    n = queries * group
    scaled = q.astype(jnp.float32) * scale
    tiled = tile_queries(scaled, table, query_lengths, kv_heads=heads, tile=1)
    q32 = tiled.q
    # Positions of padding lie past the end and are dropped at the end.
    position = tiled.position[:, None, :, None, None]  # [rows, 1, n, 1, 1]
    real = jnp.arange(queries, dtype=jnp.int32)[None, :] < query_lengths[:, None]
    real = jnp.repeat(real, group, axis=1)[:, None, :]  # [rows, 1, n]

    def logits_of(block: KeyValueBlock) -> jax.Array:
        logits = block.logits(q32)
        return logits if soft_cap is None else soft_cap * jnp.tanh(logits / soft_cap)

    def visible(token_position: jax.Array) -> jax.Array:
        """Causal and window mask for tokens at [rows, heads or 1, 1, pages, tokens]."""
        mask = token_position <= position
        if window is None:
            return mask
        return mask & ((window <= 0) | (position - token_position < window))

    # Of all heads, wherever they are: where blocks end, the softmax is rounded.
    shards = 1 if cache.split is None else cache.split.shards
    block = block_pages or pages_at_once(rows * shards, n, layout)
    offsets = jnp.arange(page_size, dtype=jnp.int32)

    def sealed_block(
        ids: jax.Array, index: jax.Array, live: jax.Array
    ) -> tuple[jax.Array, jax.Array, KeyValueBlock]:
        mask = live[:, None, None, :, None]
        exact = (index == 0) & (table.sink >= 0)[:, None]  # their first slots are kept exactly
        coded = ~exact[:, :, None] | (offsets >= layout.sink_tokens)[None, None, :]
        mask = mask & coded[:, None, None, :, :]
        if window is not None:  # sealed tokens are always past: only a window needs positions
            token = index[:, :, None, None] * page_size + slot_tokens(cache, layer, ids)
            mask = mask & visible(token.transpose(0, 2, 1, 3)[:, :, None])
        block = decode_block(cache, layer, ids, live, queries=n)
        return logits_of(block), mask, block

    def raw_block(
        ids: jax.Array, index: jax.Array, live: jax.Array
    ) -> tuple[jax.Array, jax.Array, KeyValueBlock]:
        token = index[:, :, None] * page_size + offsets[None, None, :]  # [rows, pages, tokens]
        written = live[:, :, None] & (token < table.length[:, None, None])
        kv = from_pool(bits(cache.raw)[layer, ids], layout.jax_dtype)
        kv = kv.astype(jnp.float32)  # [rows, pages, 2, heads, tokens, dim]
        # What is not written yet may hold NaN, and 0 * NaN is NaN.
        kv = jnp.where(written[:, :, None, None, :, None], kv, 0.0)
        mask = written[:, None, None] & visible(token[:, None, None])
        block = block_of(kv[:, :, 0], kv[:, :, 1], queries=n)
        return logits_of(block), mask, block

    state = _Softmax(
        top=jnp.full((rows, heads, n), MASKED, jnp.float32),
        total=jnp.zeros((rows, heads, n), jnp.float32),
        out=jnp.zeros((rows, heads, n, dim), jnp.float32),
        split=cache.split,
    )
    state, page_lse = _over_pages(
        state,
        sealed_block,
        (table.sealed, table.sealed_index, table.sealed_count),
        block if cache.base.shape[1] else 0,
        record=functools.partial(_page_lse, cache.split) if return_mass else None,
        recorded=(rows, heads, n),
    )
    if layout.sink_tokens and cache.sinks.shape[1]:
        token = jnp.arange(layout.sink_tokens, dtype=jnp.int32)[None, None, :]
        kv = cache.sinks[layer, jnp.maximum(table.sink, 0)].astype(jnp.float32)[:, None]
        kept = (table.sink >= 0)[:, None, None] & (token < table.length[:, None, None])
        kv = jnp.where(kept[:, :, None, None, :, None], kv, 0.0)
        mask = kept[:, None, None] & visible(token[:, None, None])
        first_tokens = block_of(kv[:, :, 0], kv[:, :, 1], queries=n)
        state = state.add(logits_of(first_tokens), mask, first_tokens)
    state, token_logits = _over_pages(
        state,
        raw_block,
        (table.raw, table.raw_index, table.raw_count),
        block,
        record=(lambda logits, mask: jnp.where(mask, logits, MASKED)) if return_mass else None,
        recorded=(rows, heads, n, page_size),
    )

    some = real & (state.total != 0)  # NaN is handed on
    total = jnp.where(some, state.total, 1.0)
    lse = jnp.where(some, state.top + jnp.log(total), -jnp.inf)
    out = jnp.where(some[..., None], state.out / total[..., None], 0.0)

    mass = None
    if return_mass:
        counts = real & (state.total > 0)
        sealed_mass = jnp.exp(page_lse - lse[..., None])  # [rows, heads, n, pages]
        sealed_mass = jnp.where(counts[..., None], sealed_mass, 0.0)
        raw_mass = jnp.exp(token_logits - lse[..., None, None])
        raw_mass = jnp.where(counts[..., None, None], raw_mass, 0.0)
        mass = _sum(cache.split, sealed_mass, 2), _sum(cache.split, raw_mass, 2)
    return untile_queries(out, queries).astype(q.dtype), untile_queries(lse, queries), mass


def pages_at_once(
    rows: int, queries: int, layout: CacheLayout, *, platform: str | None = None
) -> int:
    """Pages of each sequence that one pass of a loop takes.

    Args:
      rows: sequences.
      queries: of each sequence and KV head.
      layout: of the cache.
      platform: of the device, as JAX names it; None: of the default device.
    """
    of_token = rows * layout.kv_heads * layout.head_dim
    numbers = BLOCK_NUMBERS
    if (platform or jax.default_backend()) == "cpu":
        of_state = BLOCKS_PER_STATE * queries * of_token
        of_logits = MOST_LOGITS_CPU * layout.head_dim // queries
        numbers = min(max(BLOCK_NUMBERS_CPU, of_state), MOST_NUMBERS_CPU, of_logits)
    return _power_of_two_below(numbers // (of_token * layout.page_size))


def _power_of_two_below(n: int) -> int:
    """The largest power of two that is at most n; at least 1."""
    return 1 << max(0, n.bit_length() - 1)


def _sum(split: HeadSplit | None, x: jax.Array, axis: int | tuple[int, ...]) -> jax.Array:
    """Sum of [rows, heads, ...] over axes after the heads."""
    return head_by_head(split, functools.partial(jnp.sum, axis=axis), x, axes=(1,), out_axis=1)


def _page_lse(split: HeadSplit | None, logits: jax.Array, mask: jax.Array) -> jax.Array:
    """[rows, heads, n, pages]: log-sum-exp over the tokens of each page, MASKED where none."""
    top = jnp.max(jnp.where(mask, logits, MASKED), axis=4)
    total = _sum(split, jnp.where(mask, jnp.exp(logits - top[..., None]), 0.0), 4)
    return jnp.where(total > 0, top + jnp.log(jnp.where(total > 0, total, 1.0)), MASKED)


def _over_pages(
    state: _Softmax,
    load: Callable[[jax.Array, jax.Array, jax.Array], tuple[jax.Array, jax.Array, KeyValueBlock]],
    pages: tuple[jax.Array, jax.Array, jax.Array],
    block: int,
    *,
    record: Callable[[jax.Array, jax.Array], jax.Array] | None,
    recorded: tuple[int, ...],
) -> tuple[_Softmax, jax.Array]:
    """Adds all pages of a kind to the softmax, `block` of them at a time; 0: there are none.

    `record(logits, mask)` gives [rows, heads, n, block, ...] to be kept for every page; the
    second result is all of it, [rows, heads, n, pages, ...], MASKED where no page was read.
    """
    ids, index, count = pages
    columns = ids.shape[1]
    kept = jnp.full((*recorded[:3], columns, *recorded[3:]), MASKED, jnp.float32)
    if columns == 0 or block == 0:
        return state, kept
    block = min(block, columns)
    blocks = -(-columns // block)
    pad = ((0, 0), (0, blocks * block - columns))
    ids, index = jnp.pad(ids, pad), jnp.pad(index, pad)
    kept = jnp.pad(kept, ((0, 0),) * 3 + (pad[1],) + ((0, 0),) * (len(recorded) - 3))

    def body(i: jax.Array, carry: tuple[_Softmax, jax.Array]) -> tuple[_Softmax, jax.Array]:
        state, kept = carry
        column = i * block + jnp.arange(block, dtype=jnp.int32)
        live = column[None, :] < count[:, None]
        ids_now = jnp.where(live, lax.dynamic_slice_in_dim(ids, i * block, block, 1), 0)
        index_now = lax.dynamic_slice_in_dim(index, i * block, block, 1)
        logits, mask, kv = load(ids_now, index_now, live)
        if record is not None:
            kept = lax.dynamic_update_slice_in_dim(kept, record(logits, mask), i * block, 3)
        return state.add(logits, mask, kv), kept

    # A loop that runs once costs other devices a question to the host; on CPUs it saves the work
    # where no row has a page.
    if blocks == 1 and jax.default_backend() != "cpu":
        state, kept = body(jnp.int32(0), (state, kept))
    else:
        needed = jnp.max((count + block - 1) // block)
        state, kept = lax.fori_loop(0, needed.astype(jnp.int32), body, (state, kept))
    return state, kept[:, :, :, :columns]
