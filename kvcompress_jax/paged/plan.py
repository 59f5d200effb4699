"""What the host decided, as index arrays, and the one function that applies it."""

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax

from kvcompress_jax.paged.cache import PagedCache
from kvcompress_jax.paged.host_arrays import HostArray
from kvcompress_jax.paged.raw_bits import hold_bits, release_bits
from kvcompress_jax.paged.seal import Sealing, seal


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Retabling:
    """New fine chunks of sealed pages, -1 for none; the first `count` entries are real."""

    page: HostArray  # i32[n]
    chunks: HostArray  # i32[n, layers]
    count: HostArray  # i32[]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class FineUpload:
    """Fine planes that come back from a colder tier; the first `count` entries are real."""

    chunk: HostArray  # i32[n]
    fine: HostArray  # u8[n, 2, heads, fine_rows * dim/2]
    count: HostArray  # i32[]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RawCopy:
    """Copies of raw pages, for copy-on-write; the first `count` entries are real."""

    source: HostArray  # i32[n]
    target: HostArray  # i32[n]
    count: HostArray  # i32[]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Plan:
    """One step's changes, applied in this order: copies, uploads, new tables, seals.

    Parts that are None are absent from the compiled program.
    """

    copies: RawCopy | None = None
    uploads: FineUpload | None = None
    tables: Retabling | None = None
    seals: Sealing | None = None


def demote(cache: PagedCache, tables: Retabling) -> PagedCache:
    """Level 1 to 2: the pages forget their fine chunks. Moves no keys, values or codes."""
    return _retable(cache, tables)


def promote(cache: PagedCache, uploads: FineUpload, tables: Retabling) -> PagedCache:
    """Level 2 to 1: fine planes that were kept elsewhere come back, bit for bit."""

    def body(i: jax.Array, fine: jax.Array) -> jax.Array:
        return fine.at[uploads.chunk[i]].set(uploads.fine[i])

    cache = dataclasses.replace(cache, fine=lax.fori_loop(0, uploads.count, body, cache.fine))
    return _retable(cache, tables)


def evict(cache: PagedCache, dropped: Retabling) -> PagedCache:
    """Pages leave for good: no longer sealed, without chunks (`dropped.chunks` is all -1)."""
    cache = _retable(cache, dropped)
    page = jnp.where(_real(dropped.page, dropped.count), dropped.page, cache.base.shape[1])
    return dataclasses.replace(cache, sealed=cache.sealed.at[page].set(False, mode="drop"))


def copy_raw(cache: PagedCache, copies: RawCopy) -> PagedCache:
    """Copies raw pages with their statistics."""

    def body(i: jax.Array, cache: PagedCache) -> PagedCache:
        def move(pool: jax.Array) -> jax.Array:
            if pool.shape[1] == 0:  # a cache without statistics
                return pool
            return pool.at[:, copies.target[i]].set(pool[:, copies.source[i]])

        return dataclasses.replace(
            cache, raw=move(cache.raw), mass=move(cache.mass), seen=move(cache.seen)
        )

    return release_bits(lax.fori_loop(0, copies.count, body, hold_bits(cache)))


def apply_plan(cache: PagedCache, plan: Plan) -> PagedCache:
    """Applies a plan. Pure; jit it with the cache donated (`jax.jit(..., donate_argnums=0)`)."""
    if plan.copies is not None:
        cache = copy_raw(cache, plan.copies)
    if plan.tables is not None:
        if plan.uploads is not None:
            cache = promote(cache, plan.uploads, plan.tables)
        else:
            cache = demote(cache, plan.tables)
    if plan.seals is not None:
        cache = seal(cache, plan.seals)
    return cache


def _retable(cache: PagedCache, tables: Retabling) -> PagedCache:
    page = jnp.where(_real(tables.page, tables.count), tables.page, cache.base.shape[1])
    fine_of = cache.fine_of.at[:, page].set(tables.chunks.T, mode="drop")
    return dataclasses.replace(cache, fine_of=fine_of)


def _real(ids: jax.Array, count: jax.Array) -> jax.Array:
    return jnp.arange(ids.shape[0], dtype=jnp.int32) < count
