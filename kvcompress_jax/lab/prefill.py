"""A prompt that a model has read once, put into caches of any configuration.

Keys, values and the attention that they got in one uncompressed step are the same whatever happens
to them afterwards: comparing ten configurations takes one prefill, not ten.
"""

import dataclasses
import functools

import jax
import numpy as np

from kvcompress_jax.config import CompressionConfig
from kvcompress_jax.models.runner import Runner
from kvcompress_jax.paged import PagedCache, append
from kvcompress_jax.paged.raw_bits import hold_bits, release_bits


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Prefill:
    """What one step left behind, in the order of the tokens; in host memory."""

    keys: np.ndarray  # [layers, tokens, heads, dim] in the dtype of level 0
    values: np.ndarray  # like keys
    mass: np.ndarray  # f32[layers, tokens, heads], attention that each token got
    seen: np.ndarray  # f32[layers, tokens], queries that could see it


def observing(tokens: int) -> CompressionConfig:
    """A configuration that seals none of `tokens` tokens, and keeps statistics of all of them."""
    config = CompressionConfig()
    pages = -(-tokens // config.page_size) + 1
    return dataclasses.replace(config, window_tokens=pages * config.page_size)


def take_prefill(runner: Runner, sequence: int) -> Prefill:
    """What a runner of an `observing` configuration holds of a sequence."""
    tokens = runner.manager.length(sequence)
    pages = raw_pages(runner, sequence)

    def in_order(pool: jax.Array, page_axis: int) -> np.ndarray:
        """[layers, pages, ..., page_size, ...] to [layers, tokens, ...]."""
        taken = np.moveaxis(np.asarray(pool)[:, pages], page_axis, 2)
        return taken.reshape(taken.shape[0], -1, *taken.shape[3:])[:, :tokens]

    kv = in_order(runner.cache.raw, 4)
    return Prefill(
        keys=kv[:, :, 0],
        values=kv[:, :, 1],
        mass=in_order(runner.cache.mass, 3),
        seen=in_order(runner.cache.seen, 2),
    )


def raw_pages(runner: Runner, sequence: int) -> np.ndarray:
    """i32[pages], the raw pages of a sequence in the order of its tokens."""
    table = runner.manager.table([sequence])
    return table.raw[0, np.argsort(table.raw_index[0, : int(table.raw_count[0])])]


def put_prefill(runner: Runner, prefill: Prefill) -> int:
    """A new sequence that is as if the runner had read the prompt in one step; what it seals is
    sealed by the next `advance`.

    Raises:
      OutOfPagesError: no room for it.
    """
    sequence = runner.manager.add()
    slots = runner.manager.append_slots(sequence, prefill.keys.shape[1])
    runner.cache = _put(runner.cache, prefill, slots)
    return sequence


@functools.partial(jax.jit, donate_argnums=0)
def _put(cache: PagedCache, prefill: Prefill, slots: jax.Array) -> PagedCache:
    page, offset = slots // cache.layout.page_size, slots % cache.layout.page_size

    def body(layer: jax.Array, cache: PagedCache) -> PagedCache:
        cache = append(cache, layer, prefill.keys[layer], prefill.values[layer], slots)
        if not cache.layout.statistics:
            return cache
        return dataclasses.replace(
            cache,
            mass=cache.mass.at[layer, page, :, offset].set(prefill.mass[layer]),
            seen=cache.seen.at[layer, page, offset].set(prefill.seen[layer]),
        )

    layers = cache.layout.layers
    return release_bits(jax.lax.fori_loop(0, layers, body, hold_bits(cache)))
