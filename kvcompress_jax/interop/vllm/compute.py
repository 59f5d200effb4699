"""The JAX part of a layer: attention to its pools, and the code of pages.

Shapes are padded by the callers to few sizes; all layers share what is compiled.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from kvcompress_jax.importance import ImportanceRule
from kvcompress_jax.paged import (
    AttentionMass,
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


@functools.partial(jax.jit, static_argnames=("rule", "fine_rows", "fine_bits", "sink_tokens"))
def code_pages(
    kv: jax.Array,
    mass: jax.Array,
    seen: jax.Array,
    first: HostArray,
    *,
    rule: ImportanceRule,
    fine_rows: int,
    fine_bits: int,
    sink_tokens: int,
) -> tuple[PageCode, jax.Array]:
    """The codes of full pages.

    Args:
      kv: [pages, 2, heads, page_size, dim].
      mass: f32[pages, heads, page_size] attention received.
      seen: f32[pages, page_size] queries that could see each token.
      first: bool[pages]: the first tokens of the page are kept exactly elsewhere.
      rule: orders the tokens.
      fine_rows, fine_bits: of the fine plane, as in `encode_page`.
      sink_tokens: that are kept exactly.

    Returns:
      The codes, [pages, ...], and bool[pages]: the page holds a value that is not finite. Such
      values are coded as 0: scales could not hold them.
    """
    finite = jnp.isfinite(kv)
    damaged = ~jnp.all(finite, axis=(1, 2, 3, 4))
    kv = jnp.where(finite, kv, jnp.zeros_like(kv))
    exact = first[:, None] & (jnp.arange(kv.shape[3]) < sink_tokens)[None, :]
    encode = functools.partial(encode_page, rule=rule, fine_rows=fine_rows, fine_bits=fine_bits)
    code = jax.vmap(encode)(kv[:, 0], kv[:, 1], mass, seen, exact if sink_tokens else None)
    return code, damaged


@jax.jit
def read_block(cache: PagedCache, ids: HostArray) -> jax.Array:
    """Keys and values of sealed pages, i32[n], in token order: f32[n, 2, heads, page_size, dim]."""
    return jnp.stack(read_pages(cache, 0, jnp.asarray(ids)), axis=1)


def with_workspace(cache: PagedCache, workspace: jax.Array) -> PagedCache:
    """The same sealed pages, and other raw ones: [pages, 2, heads, page_size, dim]."""
    return dataclasses.replace(cache, raw=workspace[None])
