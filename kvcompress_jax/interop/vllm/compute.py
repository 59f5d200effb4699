"""The JAX part of a layer: attention to its pools, and the code of pages.

Shapes are padded by the callers to few sizes; all layers share what is compiled.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from kvcompress_jax.calibrated import CalibratedCode, RowLayout, encode_rows
from kvcompress_jax.calibrated.code import LARGEST
from kvcompress_jax.feedback import at_position
from kvcompress_jax.interop.vllm.tables import CodeTables
from kvcompress_jax.paged import (
    AttentionMass,
    CacheLayout,
    PageCode,
    PagedCache,
    PageTable,
    attend,
    encode_page,
    read_pages,
)
from kvcompress_jax.paged.host_arrays import HostArray


@functools.partial(jax.jit, static_argnames=("scale", "soft_cap", "return_mass"))
def attend_rows(
    q: jax.Array,
    cache: PagedCache,
    table: PageTable,
    query_lengths: jax.Array,
    *,
    scale: float,
    soft_cap: float | None,
    return_mass: bool,
) -> tuple[jax.Array, AttentionMass | None]:
    """`attend` on the pools of one layer.

    Args:
      q: [rows, queries, heads, dim].
      cache: of one layer.
      table: of the rows.
      query_lengths: i32[rows].
      scale: of the logits.
      soft_cap: of the logits, or None.
      return_mass: also return attention mass.
    """
    out, _, mass = attend(
        q,
        cache,
        0,
        table,
        query_lengths=query_lengths,
        scale=scale,
        soft_cap=soft_cap,
        return_mass=return_mass,
    )
    return out, mass


@functools.partial(jax.jit, static_argnames=("layout", "fine_rows"))
def code_pages(
    kv: jax.Array,
    mass: jax.Array,
    seen: jax.Array,
    first: HostArray,
    exact: HostArray,
    tables: CodeTables,
    *,
    layout: CacheLayout,
    fine_rows: int,
) -> tuple[dict[str, jax.Array], jax.Array]:
    """The codes of full pages.

    Args:
      kv: [pages, 2, heads, page_size, dim].
      mass: f32[pages, heads, page_size] attention received.
      seen: f32[pages, page_size] queries that could see each token.
      first: i32[pages], position of each page's first token.
      exact: bool[pages]: the first tokens of the page are kept exactly elsewhere.
      tables: of the layer.
      layout: of the layer.
      fine_rows: of the fine plane; 0 where no page has a chunk.

    Returns:
      The codes, [pages, ...] by the names of the pools, and bool[pages]: the page holds a value
      that is not finite, or too large for a calibrated code. Such values are coded as 0: scales
      could not hold them.
    """
    most = jnp.finfo(jnp.float32).max if layout.rows is None else LARGEST
    sound = jnp.abs(kv.astype(jnp.float32)) <= most  # LARGEST is no number of float16
    damaged = ~jnp.all(sound, axis=(1, 2, 3, 4))
    kv = jnp.where(sound, kv, jnp.zeros_like(kv))
    first = jnp.asarray(first)
    kept = exact[:, None] & (jnp.arange(kv.shape[3]) < layout.sink_tokens)[None, :]
    if layout.rows is not None and tables.code is not None:
        return _rows(kv, mass, seen, first, kept, tables.code.at(0), layout.rows), damaged
    learned, feedback = jax.tree.map(lambda x: x[0], (tables.learned, tables.feedback))

    def encode(
        kv: jax.Array, mass: jax.Array, seen: jax.Array, first: jax.Array, kept: jax.Array | None
    ) -> PageCode:
        return encode_page(
            kv[0],
            kv[1],
            mass,
            seen,
            kept,
            learned,
            None if feedback is None else at_position(feedback, first),
            rule=layout.importance,
            fine_rows=fine_rows,
            fine_bits=layout.fine_bits,
        )

    code = jax.vmap(encode)(kv, mass, seen, first, kept if layout.sink_tokens else None)
    return {
        "base": code.base,
        "key_step": code.key_scale.step,
        "key_zero": code.key_scale.zero,
        "value_step": code.value_scale.step,
        "value_zero": code.value_scale.zero,
        "order": code.order,
        "fine": code.fine,
    }, damaged


def _rows(
    kv: jax.Array,
    mass: jax.Array,
    seen: jax.Array,
    first: jax.Array,
    kept: jax.Array,
    code: CalibratedCode,
    rows: RowLayout,
) -> dict[str, jax.Array]:
    attention = mass / jnp.maximum(seen, 1.0)[:, None]
    encode = jax.vmap(functools.partial(encode_rows, code=code, rows=rows))
    base, refined = encode(kv[:, 0], kv[:, 1], attention, kept, first)
    return {"base": base, "refined": refined}


@jax.jit
def read_block(cache: PagedCache, ids: HostArray) -> jax.Array:
    """Keys and values of sealed pages, i32[n], in token order: f32[n, 2, heads, page_size, dim]."""
    return jnp.stack(read_pages(cache, 0, jnp.asarray(ids)), axis=1)


def with_workspace(cache: PagedCache, workspace: jax.Array) -> PagedCache:
    """The same sealed pages, and other raw ones: [pages, 2, heads, page_size, dim]."""
    return dataclasses.replace(cache, raw=workspace[None])
