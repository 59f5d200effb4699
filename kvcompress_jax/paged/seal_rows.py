"""Full raw pages to rows of the calibrated code."""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from kvcompress_jax.calibrated import CalibratedCode, RowLayout, encode_rows
from kvcompress_jax.paged.cache import PagedCache
from kvcompress_jax.paged.heads import head_by_head


def seal_rows(
    cache: PagedCache,
    *,
    code: CalibratedCode,
    rows: RowLayout,
    kv: jax.Array,
    attention: tuple[jax.Array, jax.Array],
    exact: jax.Array,
    first: jax.Array,
    page: jax.Array,
) -> PagedCache:
    """Codes one page of all layers and writes it.

    Args:
      cache: updated in place under donation.
      code: of all layers.
      rows: of the layout.
      kv: [layers, 2, heads, page_size, dim], of the raw page.
      attention: f32[layers, heads, page_size] received so far, and f32[layers, page_size] queries
        that could see each token.
      exact: bool[page_size], tokens that are kept exactly elsewhere.
      first: i32[], position of the page's first token.
      page: i32[] to write.
    """
    mass, seen = attention
    mean = mass / jnp.maximum(seen, 1.0)[:, None]
    encoder = functools.partial(encode_rows, rows=rows)
    encode_layers = jax.vmap(encoder, in_axes=(0, 0, 0, None, None, 0))

    def encode(
        keys: jax.Array, values: jax.Array, mean: jax.Array, of_heads: CalibratedCode
    ) -> tuple[jax.Array, jax.Array]:
        whole = dataclasses.replace(of_heads, frequencies=code.frequencies)
        return encode_layers(keys, values, mean, exact, first, whole)

    row, refined = head_by_head(
        cache.split,
        encode,
        *(kv[:, 0], kv[:, 1], mean, dataclasses.replace(code, frequencies=None)),  # type: ignore[arg-type]
        axes=(1, 1, 1, 1),
        out_axis=1,
    )
    return dataclasses.replace(
        cache,
        base=cache.base.at[:, page].set(row),
        refined=cache.refined.at[:, page].set(refined),
        first=cache.first.at[page].set(first),
    )
