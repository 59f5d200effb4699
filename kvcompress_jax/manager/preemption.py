"""Whole sequences to host memory, and back."""

from kvcompress_jax.manager import swap
from kvcompress_jax.manager.device import Device
from kvcompress_jax.manager.lives import Lives
from kvcompress_jax.manager.page import Sequence
from kvcompress_jax.manager.prefix_cache import PrefixCache
from kvcompress_jax.manager.seals import Seals
from kvcompress_jax.paged.cache import PagedCache


class Preemption:
    """`KVCacheManager.preempt` and `resume` say what they promise."""

    def __init__(self, lives: Lives, seals: Seals, prefixes: PrefixCache, device: Device) -> None:
        self._lives = lives
        self._seals = seals
        self._prefixes = prefixes
        self._device = device

    def preempt(self, sequence: Sequence, cache: PagedCache) -> None:
        """Copies the pages that the sequence alone owns, and gives their ids back."""
        if self._lives.copies:
            raise RuntimeError("preempt: expected no forks that wait for a plan")
        self._seals.commit(cache)
        self._seals.cancel(sequence)
        # Prefixes that nobody else uses go: else their pages would stay, and there were no room.
        self._prefixes.release_pages_of(sequence)
        store = self._lives.store
        own = [p for p in sequence.pages if p.owners == {sequence.id} and not p.kept]
        sequence.swapped = swap.out(self._device, store, cache, own)
        for page in own:
            store.return_code(page)
            store.return_raw(page)
        self._lives.leave_row(sequence)
        self._lives.counters.preemptions += 1

    def resume(self, sequence: Sequence, cache: PagedCache) -> PagedCache:
        """Takes ids for all of it, or none, and writes the pages there."""
        if sequence.swapped is None:
            raise ValueError(f"sequence {sequence.id}: expected a preempted one")
        store, swapped, tenant = self._lives.store, sequence.swapped, sequence.tenant
        need = swapped.needs()
        pools = (store.rows, store.raw, store.sealed, store.chunks, store.sinks)
        for pool, count in zip(pools, need, strict=True):
            self._prefixes.make_room(pool, tenant, count)
            pool.require(count, tenant)
        (row,), *ids = (pool.take(n, tenant) for pool, n in zip(pools, need, strict=True))
        cache = swapped.back(self._device, store, cache, *ids)
        sequence.swapped = None
        self._lives.enter_row(sequence, row)
        self._lives.counters.resumes += 1
        return cache
