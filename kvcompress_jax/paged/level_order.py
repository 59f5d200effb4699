"""The pages of a batch in the order of their levels, once for all layers of a step."""

import dataclasses

import jax.numpy as jnp
from jax import lax

from kvcompress_jax.kernels.dispatch import on_gpu
from kvcompress_jax.paged.cache import PagedCache
from kvcompress_jax.paged.table import PageTable


def order_by_level(cache: PagedCache, table: PageTable) -> PageTable:
    """Puts sealed pages with fine chunks before those without, where the device has kernels that
    would else sort them in every layer.

    A page has chunks in all layers, or in floor layers alone. Pages with more of them come first:
    then those with one come first in each layer. Pages of the same level stay in their order.

    Args:
      cache: whose pages they are, not demoted or promoted until the table is used.
      table: of a step.

    Returns:
      The table, with `by_level` set; the same one where nobody would profit.
    """
    if not on_gpu() or not cache.layout.fine_rows or not table.sealed.shape[1]:
        return table
    ids, index = jnp.asarray(table.sealed), jnp.asarray(table.sealed_index)
    column = jnp.arange(ids.shape[1], dtype=jnp.int32)[None, :]
    read = column < jnp.asarray(table.sealed_count)[:, None]
    chunks = jnp.sum(cache.fine_of >= 0, axis=0, dtype=jnp.int32)
    place = jnp.where(read, -chunks[jnp.where(read, ids, 0)], 1)
    _, ids, index = lax.sort((place, ids, index), num_keys=1, is_stable=True)
    return dataclasses.replace(table, sealed=ids, sealed_index=index, by_level=True)
