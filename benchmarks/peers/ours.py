"""kvcompress_jax: `seal`, `decode_pages` and `attend`, jitted."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kvcompress_jax.config import CompressionConfig
from kvcompress_jax.paged import PageTable, PoolSizes, Sealing, decode_pages, init_cache, seal
from kvcompress_jax.paged.attention import attend

from .contract import NotAvailableError, Workload


class Ours:
    """Keys per channel over pages of 64 tokens, values per token, one embedded code.

    Bits: 8 (level 1, all tokens refined) or 4 (level 2).
    """

    def __init__(self, bits: int) -> None:
        self.name, self.bits = "kvcompress_jax", bits

    def load(self, work: Workload) -> None:
        if self.bits not in (4, 8):
            raise NotAvailableError("4 or 8 bits")
        shape = work.shape
        config = CompressionConfig(ratio=1.0, sink_tokens=0)
        layout = config.layout(
            layers=shape.layers, kv_heads=shape.kv_heads, head_dim=shape.head_dim
        )
        size = layout.page_size
        each = shape.tokens // size
        pages = shape.batch * each
        refined = self.bits == 8
        cache = init_cache(
            layout,
            PoolSizes(
                raw_pages=pages,
                sealed_pages=pages,
                fine_chunks=pages * shape.layers if refined else 0,
                sink_slots=0,
            ),
        )
        kv = np.stack([work.keys, work.values], axis=2)  # layers, batch, 2, heads, tokens, dim
        kv = kv.reshape(*kv.shape[:4], each, size, shape.head_dim)
        kv = np.moveaxis(kv, 4, 2).reshape(cache.raw.shape)
        cache = dataclasses.replace(cache, raw=jnp.asarray(kv).astype(jnp.bfloat16))
        ids = np.arange(pages, dtype=np.int32)
        chunks = np.arange(pages * shape.layers, dtype=np.int32).reshape(pages, shape.layers)
        self._work = Sealing(
            raw=ids,
            page=ids,
            chunks=chunks if refined else np.full_like(chunks, -1),
            first=np.zeros(pages, np.int32),
            sink=np.full(pages, -1, np.int32),
            count=np.int32(pages),
        )
        table = ids.reshape(shape.batch, each)
        none = np.zeros((shape.batch, 0), np.int32)
        page_table = PageTable(
            sealed=table,
            sealed_index=np.broadcast_to(np.arange(each, dtype=np.int32), table.shape),
            sealed_count=np.full(shape.batch, each, np.int32),
            raw=none,
            raw_index=none,
            raw_count=np.zeros(shape.batch, np.int32),
            sink=np.full(shape.batch, -1, np.int32),
            length=np.full(shape.batch, shape.tokens, np.int32),
        )
        # Of a step of generation: made once for all layers.
        self._table = jax.tree.map(jnp.asarray, page_table)
        self._q = jnp.asarray(work.queries)[:, :, None].astype(jnp.bfloat16)
        self._cache = cache
        self._shape = shape
        self._seal = jax.jit(seal, donate_argnums=0)
        self._open = jax.jit(functools.partial(_open, pages=pages))
        self._attend = jax.jit(_attend)

    def compress(self) -> Any:
        # The pools are updated in place, as in serving.
        self._cache = jax.block_until_ready(self._seal(self._cache, self._work))
        return self._cache

    def decompress(self, code: Any) -> Any:
        return jax.block_until_ready(self._open(code))

    def attend(self, code: Any) -> Any:
        return jax.block_until_ready(self._attend(code, self._q, self._table))

    def opened(self, result: Any) -> tuple[np.ndarray, np.ndarray]:
        """Token order is restored here: attention needs none, so decoding does not pay for it."""
        slots = np.argsort(np.asarray(self._cache.order), axis=-1)[..., None]
        keys, values = (
            self._by_sequence(
                np.take_along_axis(
                    np.stack([np.asarray(layer, np.float32) for layer in x]), slots, axis=-2
                )
            )
            for x in zip(*result, strict=True)
        )
        return keys, values

    def _by_sequence(self, x: np.ndarray) -> np.ndarray:
        """[layers, pages, heads, page_size, dim] to [layers, batch, heads, tokens, dim]."""
        shape = self._shape
        x = x.reshape(shape.layers, shape.batch, -1, *x.shape[2:])
        return np.moveaxis(x, 2, 3).reshape(
            shape.layers, shape.batch, shape.kv_heads, shape.tokens, shape.head_dim
        )

    def attended(self, result: Any) -> np.ndarray:
        return np.asarray(result, np.float32)[:, :, 0]

    def code_bytes(self, code: Any) -> int:
        return sum(
            x.nbytes
            for x in jax.tree.leaves(
                (code.base, code.fine, code.key_scale, code.value_scale, code.order, code.fine_of)
            )
        )


def _open(cache: Any, pages: int) -> list[tuple[jax.Array, jax.Array]]:
    """Layer by layer, as peers do."""
    ids = jnp.arange(pages, dtype=jnp.int32)
    dtype = cache.layout.jax_dtype
    return [decode_pages(cache, i, ids, dtype=dtype) for i in range(cache.layout.layers)]


def _attend(cache: Any, q: jax.Array, table: PageTable) -> jax.Array:
    def layer(x: tuple[jax.Array, jax.Array]) -> jax.Array:
        return attend(x[1], cache, x[0], table)[0]

    return jax.lax.map(layer, (jnp.arange(cache.layout.layers, dtype=jnp.int32), q))
