"""The paged cache as a pytree of pools."""

import dataclasses

import jax
import jax.numpy as jnp

from kvcompress_jax.calibrated import CalibratedCode
from kvcompress_jax.codec import Scale
from kvcompress_jax.feedback import KeyFeedback
from kvcompress_jax.importance import LearnedScore
from kvcompress_jax.kernels.pools import CodePools
from kvcompress_jax.paged.heads import HeadSplit
from kvcompress_jax.paged.layout import CacheLayout, PoolSizes
from kvcompress_jax.paged.telemetry import Telemetry, init_telemetry


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PagedCache:
    """All pools of one model's cache; shapes in `kvcompress_jax.paged.layout`.

    Invariants: `sealed[p]` is False until page p holds the code of finite keys and values;
    `fine_of[l, p]` is a chunk that no other (layer, page) names, or -1; which pages are in use is
    the host's business (`kvcompress_jax.manager`), what unused ones hold is nobody's.
    """

    raw: jax.Array
    mass: jax.Array
    seen: jax.Array
    base: jax.Array
    key_scale: Scale
    value_scale: Scale
    order: jax.Array
    fine: jax.Array
    fine_of: jax.Array
    refined: jax.Array
    first: jax.Array
    sinks: jax.Array
    sealed: jax.Array
    heat: jax.Array
    rejected: jax.Array  # i32[]: pages that were left at level 0 because a value was not finite
    code: CalibratedCode | None  # of level 3; not a pool, and the same for every cache of a model
    layout: CacheLayout = dataclasses.field(metadata={"static": True})
    learned: LearnedScore | None = None  # weights of the trained importance, read only
    feedback: KeyFeedback | None = None  # what keys are rounded with; None: to the nearest
    telemetry: Telemetry | None = None
    # None outside `jax.shard_map`: the arrays are whole, wherever they are.
    split: HeadSplit | None = dataclasses.field(default=None, metadata={"static": True})

    @property
    def sizes(self) -> PoolSizes:
        """Capacities, read off the shapes."""
        return PoolSizes(
            raw_pages=self.raw.shape[1],
            sealed_pages=self.base.shape[1],
            fine_chunks=self.fine.shape[0],
            sink_slots=self.sinks.shape[1],
            shadow_pages=self.telemetry.shadow.shape[1] if self.telemetry else 0,
            learned_bytes=sum(x.nbytes for x in jax.tree.leaves(self.learned)),
        )


def init_cache(
    layout: CacheLayout,
    sizes: PoolSizes,
    code: CalibratedCode | None = None,
    *,
    learned: LearnedScore | None = None,
    feedback: KeyFeedback | None = None,
) -> PagedCache:
    """An empty cache. Every pool is allocated at once and never grows.

    Args:
      layout: of a page.
      sizes: of the pools.
      code: of level 3; exactly where the layout has rows. Like `learned` and `feedback`, the cache
        keeps a copy: a cache is donated.
      learned: trained importance score that pages are sealed with.
      feedback: that keys of tokens without a fine plane are rounded with; None: to the nearest.

    Raises:
      ValueError: a layout with rows without a code, or the other way round, or feedback that does
        not fit the layout.
    """
    if (code is None) != (layout.rows is None):
        raise ValueError(
            f"code: expected {'none' if layout.rows is None else 'a calibrated code'} for a layout"
            f" with rows={layout.rows}, got {'none' if code is None else 'one'}"
        )
    layers, heads, dim = layout.layers, layout.kv_heads, layout.head_dim
    if feedback is not None:
        if layout.rows is not None:
            raise ValueError("feedback: expected none beside a calibrated code, got one")
        expected = (layers, heads, 2, dim // 2)
        if feedback.carry.shape[:4] != expected:
            raise ValueError(
                f"feedback: expected {list(expected)} (layers, kv_heads, 2, head_dim / 2),"
                f" got {list(feedback.carry.shape[:4])}"
            )
    page, pages = layout.page_size, sizes.sealed_pages
    counted = sizes.raw_pages if layout.statistics else 0
    base_shape: tuple[int, ...] = (layers, pages, 2, heads, page * dim // 2)
    refined_shape: tuple[int, ...] = (layers, 0, heads, 0, 2, 0)
    coded, placed = pages, 0  # pages with scales and order, and pages that know their position
    if layout.rows is not None:
        base_shape = (layers, pages, heads, page, layout.rows.row_bytes(dim))
        count = layout.rows.refined_tokens(page)
        refined_shape = (layers, pages, heads, count, 2, layout.rows.refined_bytes(dim))
        coded, placed = 0, pages

    def scale(*shape: int) -> Scale:
        return Scale(step=jnp.zeros(shape, jnp.bfloat16), zero=jnp.zeros(shape, jnp.float16))

    return PagedCache(
        raw=jnp.zeros((layers, sizes.raw_pages, 2, heads, page, dim), layout.jax_dtype),
        mass=jnp.zeros((layers, counted, heads, page), jnp.float32),
        seen=jnp.zeros((layers, counted, page), jnp.float32),
        base=jnp.zeros(base_shape, jnp.uint8),
        key_scale=scale(layers, coded, heads, dim),
        value_scale=scale(layers, coded, heads, page),
        order=jnp.zeros((layers, coded, heads, page), jnp.uint8),
        fine=jnp.zeros((sizes.fine_chunks, 2, heads, layout.fine_rows * dim // 2), jnp.uint8),
        fine_of=jnp.full((layers, pages), -1, jnp.int32),
        refined=jnp.zeros(refined_shape, jnp.uint8),
        first=jnp.zeros((placed,), jnp.int32),
        sinks=jnp.zeros(
            (layers, sizes.sink_slots, 2, heads, layout.sink_tokens, dim), layout.jax_dtype
        ),
        sealed=jnp.zeros((pages,), jnp.bool),
        heat=jnp.zeros((pages,), jnp.float32),
        rejected=jnp.zeros((), jnp.int32),
        code=jax.tree.map(jnp.copy, code),
        layout=layout,
        learned=jax.tree.map(jnp.copy, learned),
        feedback=jax.tree.map(jnp.copy, feedback),
        telemetry=init_telemetry(
            (layers, sizes.shadow_pages, 2, heads, page, dim), layout.jax_dtype
        )
        if sizes.shadow_pages
        else None,
    )


def code_pools(cache: PagedCache) -> CodePools:
    """The pools of base and fine planes, as kernels take them."""
    return CodePools(
        base=cache.base,
        fine=cache.fine,
        key_step=cache.key_scale.step,
        key_zero=cache.key_scale.zero,
        value_step=cache.value_scale.step,
        value_zero=cache.value_scale.zero,
        order=cache.order,
        fine_bits=cache.layout.fine_bits,
    )
