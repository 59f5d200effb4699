"""Seals, demotions and promotions: what is due becomes a plan, and is confirmed."""

import logging
from collections.abc import Iterable

import numpy as np

from kvcompress_jax.config import CompressionConfig
from kvcompress_jax.manager import levels
from kvcompress_jax.manager.counters import Counters
from kvcompress_jax.manager.device import Device
from kvcompress_jax.manager.draft import ENTRIES, UPLOADS, Draft
from kvcompress_jax.manager.page import NONE, Page
from kvcompress_jax.manager.page_store import PageStore
from kvcompress_jax.manager.shadows import Shadows
from kvcompress_jax.manager.tables import TableRows
from kvcompress_jax.paged.cache import PagedCache

logger = logging.getLogger("kvcompress_jax.manager")


class LevelControl:
    """Moves pages between levels; `levels` says which, this does it."""

    def __init__(
        self,
        store: PageStore,
        tables: TableRows,
        config: CompressionConfig,
        counters: Counters,
        device: Device,
    ) -> None:
        self.store = store
        self.config = config
        self.counters = counters
        self.shadows = Shadows(store.sizes.shadow_pages, config.telemetry_share)
        self._tables = tables
        self._device = device
        self._asked: list[tuple[int, Page]] = []

    def ask(self, level: int, pages: Iterable[Page]) -> None:
        """Asks the next plans for a level."""
        self._asked += [(level, page) for page in pages]

    def fill(self, draft: Draft, cache: PagedCache | None) -> None:
        """Puts what is due into a draft; see `KVCacheManager.plan`."""
        store = self.store
        while self._asked and len(draft.tables) < ENTRIES and len(draft.uploads) < UPLOADS:
            level, page = self._asked.pop(0)
            if page.uid in store.pages:
                if level == 2:
                    self._demote(page, draft, cache)
                elif not self._promote(page, draft):
                    self.counters.refusals += 1
        if self.config.demote_after_tokens is not None:
            pages = list(store.pages.values())
            for page in levels.aged(pages, [store.age(p) for p in pages], self.config):
                if len(draft.tables) < ENTRIES:
                    self._demote(page, draft, cache)
        candidates = store.pages.values() if len(store.host) else ()
        for page in levels.hot(candidates, store.host, self.config):
            if len(draft.uploads) == UPLOADS:
                break
            cold = levels.coldest(store.pages.values())
            if (
                store.chunks.free < store.missing_chunks
                and cold
                and levels.displaces(page, cold[0], self.config)
            ):
                self._demote(cold[0], draft, cache)
            if not self._promote(page, draft):
                break
        for page in self._due():
            if len(draft.seals) == ENTRIES or not self._seal(page, draft, cache):
                break

    def commit(self, cache: PagedCache) -> None:
        """Confirms the seals of the last plan; see `KVCacheManager.commit`."""
        store = self.store
        if not store.pending:
            return
        sealed = self._device.sealed(cache)
        pending, store.pending = store.pending, []
        for page in pending:
            page.pending = False
            if sealed[page.sealed]:
                store.return_raw(page)
                self.counters.seals += 1
            else:
                store.return_code(page)
                page.unsealable = True
                self.counters.rejected += 1
                why = self._device.why_rejected(cache, page.raw, page.index)
                logger.warning("page stays at level 0: %s", why)
        for owner in set().union(*(p.owners for p in pending)):
            if store.sequences[owner].row != NONE:
                self._tables.refresh(store.sequences[owner])

    def _due(self) -> list[Page]:
        """Raw pages that left the window of all their owners, each once, oldest first."""
        if not self.config.compresses:
            return []
        due = {}
        for sequence in self.store.sequences.values():
            if sequence.swapped is not None:
                continue
            pages = sequence.pages
            while sequence.settled < len(pages) and (
                pages[sequence.settled].sealed != NONE or pages[sequence.settled].unsealable
            ):
                sequence.settled += 1
            for page in pages[sequence.settled :]:
                end = (page.index + 1) * self.store.layout.page_size
                if sequence.length - end < self.config.window_tokens:
                    break
                at_rest = page.sealed != NONE or page.unsealable
                if not at_rest and self.store.age(page) >= self.config.window_tokens:
                    due[page.uid] = page
        return list(due.values())

    def _seal(self, page: Page, draft: Draft, cache: PagedCache | None) -> bool:
        """Plans a seal; False when there is no room for one."""
        store = self.store
        first = page.index == 0 and store.layout.sink_tokens > 0
        if not store.sealed.free or (first and not store.sinks.free):
            return False
        level = self.config.sealed_level
        if level == 1:
            # Under pressure the coldest pages make room for the new one.
            for cold in levels.coldest(store.pages.values()):
                if store.chunks.free >= store.chunks_for(1) or len(draft.tables) == ENTRIES:
                    break
                self._demote(cold, draft, cache)
            if store.chunks.free < store.chunks_for(1):
                level = 2
                self.counters.unrefined += 1
        if store.chunks.free < store.chunks_for(level):
            return False  # a floor layer without its chunk: the page waits at level 0
        page.chunks = store.take_chunks(level)
        (page.sealed,) = store.sealed.take()
        if first:
            (page.sink,) = store.sinks.take()
        page.level, page.heat, page.pending = level, 0.0, True
        store.pending.append(page)
        first_token = page.index * store.layout.page_size
        draft.seals.append((page.raw, page.sealed, page.chunks, first_token, page.sink))
        if draft.shadows is not None:
            draft.shadows.append(self.shadows.choose(page, store.sealed.used))
        return True

    def _demote(self, page: Page, draft: Draft, cache: PagedCache | None) -> None:
        if page.level != 1 or page.pending or page.sealed in draft.tables or self.config.levels < 3:
            return  # a page promoted by this very plan has no fine plane on the device yet
        store = self.store
        if cache is not None and self.config.host_bytes:
            chunks = np.array(page.chunks, np.int32)
            store.host.put(page.uid, self._device.fine_planes(cache, chunks))
        kept = tuple(c if i in store.floors else NONE for i, c in enumerate(page.chunks))
        store.chunks.give_back(set(page.chunks) - set(kept))
        page.chunks, page.level = kept, 2
        draft.tables[page.sealed] = kept
        self.counters.demotions += 1

    def _promote(self, page: Page, draft: Draft) -> bool:
        """Plans a promotion; False when it must be refused."""
        store = self.store
        if page.level != 2 or page.uid not in store.host:
            return False
        if store.chunks.free < store.missing_chunks:
            return False
        ids = iter(store.chunks.take(store.missing_chunks))
        new = tuple(next(ids) if c == NONE else NONE for c in page.chunks)
        draft.uploads.append((new, store.host.take(page.uid)))
        page.chunks = tuple(max(a, b) for a, b in zip(page.chunks, new, strict=True))
        page.level = 1
        draft.tables[page.sealed] = page.chunks
        self.counters.promotions += 1
        return True
