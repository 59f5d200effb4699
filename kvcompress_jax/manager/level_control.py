"""Seals, demotions and promotions: what is due becomes a plan."""

from collections import deque
from collections.abc import Iterable

import numpy as np

from kvcompress_jax.config import CompressionConfig
from kvcompress_jax.manager import levels
from kvcompress_jax.manager.counters import Counters
from kvcompress_jax.manager.device import Device
from kvcompress_jax.manager.draft import ENTRIES, UPLOADS, Draft
from kvcompress_jax.manager.page import NONE, Page
from kvcompress_jax.manager.page_store import PageStore
from kvcompress_jax.manager.prefix_cache import PrefixCache
from kvcompress_jax.manager.schedule import Schedule
from kvcompress_jax.manager.shadows import Shadows
from kvcompress_jax.paged.cache import PagedCache

# Coldest pages that are looked up at a time.
_QUEUE = 8 * ENTRIES


class LevelControl:
    """Moves pages between levels; `levels` says which, this does it."""

    def __init__(
        self,
        store: PageStore,
        schedule: Schedule,
        prefixes: PrefixCache,
        config: CompressionConfig,
        counters: Counters,
        device: Device,
        coldness: levels.Coldness | None = None,
    ) -> None:
        self.store = store
        self.config = config
        self.counters = counters
        self.shadows = Shadows(store.sizes.shadow_pages, config.telemetry_share)
        self._schedule = schedule
        self._prefixes = prefixes
        self._device = device
        self._coldness = coldness or (lambda pages: -store.heat[pages])
        self._asked: deque[tuple[int, Page]] = deque()
        self._hot: deque[Page] = deque()
        self._cold: dict[str, deque[Page]] = {}  # of each tenant
        self._waiting: dict[int, Page] = {}  # their fine planes are on their way from the disk
        self._look_at_old = False
        self.more = False  # whether the next plan may have something to do at once

    def ask(self, level: int, pages: Iterable[Page]) -> None:
        """Asks the next plans for a level."""
        self._asked += [(level, page) for page in pages]

    def report_heat(self, heat: np.ndarray, known: np.ndarray) -> None:
        """New heat of sealed pages; `known` says of which."""
        store = self.store
        store.heat = np.where(known, heat, store.heat).astype(np.float32)
        store.typical_heat = levels.typical_heat(store.heat, store.level)
        self._cold.clear()
        self._look_at_old = self.config.demote_after_tokens is not None
        self._hot.clear()
        if len(store.host):
            found = levels.hot(store.heat, store.level, store.typical_heat, self.config)
            self._hot.extend(p for i in found[:_QUEUE] if (p := store.holder[i]) is not None)

    def fill(self, draft: Draft, cache: PagedCache | None) -> None:
        """Puts what is due into a draft; see `KVCacheManager.plan`."""
        for uid in self.store.host.settle():
            if (page := self._waiting.pop(uid, None)) is not None:
                self._asked.append((1, page))
        while self._asked and len(draft.tables) < ENTRIES and len(draft.uploads) < UPLOADS:
            level, page = self._asked.popleft()
            if page.uid in self.store.pages:
                if level == 2:
                    self._demote(page, draft, cache)
                elif not self._promote(page, draft) and page.uid not in self._waiting:
                    self.counters.refusals += 1
        self._demote_old(draft, cache)
        self._promote_hot(draft, cache)
        leaving = self._schedule.leaving()
        for page in leaving:
            if len(draft.seals) == ENTRIES or not self._seal(page, draft, cache):
                break
        # More may be due when the plan was full, or when a page is old enough once it is sealed.
        ageing = bool(draft.seals) and self.config.demote_after_tokens is not None
        self.more = (
            ageing
            or len(leaving) > len(draft.seals)
            or len(draft.tables) == ENTRIES
            or bool(self._asked or self._hot or self._look_at_old)
        )

    def _demote_old(self, draft: Draft, cache: PagedCache | None) -> None:
        if self.config.demote_after_tokens is None:
            return
        if not self._schedule.ageing() and not self._look_at_old:
            return
        self._look_at_old = False
        store = self.store
        for i in levels.aged(store.heat, store.level, store.old, store.typical_heat):
            page = store.holder[i]
            assert page is not None
            if store.age(page) < self.config.demote_after_tokens:
                continue  # not in all of its owners
            if len(draft.tables) == ENTRIES:
                self._look_at_old = True
                return
            self._demote(page, draft, cache)

    def _promote_hot(self, draft: Draft, cache: PagedCache | None) -> None:
        store = self.store
        while self._hot and len(draft.uploads) < UPLOADS and len(draft.tables) < ENTRIES:
            page = self._hot.popleft()
            if page.level != 2 or page.sealed == NONE or page.uid not in store.host:
                continue
            if store.chunks.room(page.tenant) < store.missing_chunks:
                cold = self._coldest(page.tenant, draft)
                heat = float(store.heat[page.sealed])
                if cold is None or not levels.displaces(
                    heat, float(store.heat[cold.sealed]), self.config
                ):
                    continue
                if not store.host.ready(page.uid):  # nobody makes room for what is not there yet
                    self._waiting[page.uid] = page
                    continue
                planes = store.host.take(page.uid)  # those of the cold page could displace them
                self._demote(cold, draft, cache)
                store.host.put(page.uid, planes, page.tenant)
            self._promote(page, draft)

    def _coldest(self, tenant: str, draft: Draft) -> Page | None:
        """The tenant's page at level 1 to demote first; each is named once until heat is reported,
        or nothing else is left."""
        store = self.store
        if (number := store.tenants.get(tenant)) is None:
            return None  # it has no page yet
        for again in (False, True):
            queue = self._cold.setdefault(tenant, deque())
            while queue:
                page = queue.popleft()
                settled = page.level == 1 and page.sealed != NONE and not page.pending
                if settled and page.sealed not in draft.tables:
                    return page
            if not again:
                mask = store.level == 1
                if len(store.tenants) > 1:
                    mask &= store.tenant == number
                pages = np.flatnonzero(mask)
                order = levels.coldest(self._coldness(pages), pages, store.uid[pages], _QUEUE)
                queue.extend(p for i in order if (p := store.holder[i]) is not None)
        return None

    def _seal(self, page: Page, draft: Draft, cache: PagedCache | None) -> bool:
        """Plans a seal; False when there is no room for one."""
        store, tenant = self.store, page.tenant
        first = page.index == 0 and store.layout.sink_tokens > 0
        if not self._prefixes.make_room(store.sealed, tenant, 1):
            return False
        if first and not self._prefixes.make_room(store.sinks, tenant, 1):
            return False
        level = self.config.sealed_level
        if level == 1 and self.config.levels == 3:
            # Under pressure the tenant's coldest pages make room for the new one.
            need = store.chunks_for(1)
            while store.chunks.room(tenant) < need and len(draft.tables) < ENTRIES:
                cold = self._coldest(tenant, draft)
                if cold is None:
                    break
                self._demote(cold, draft, cache)
            if store.chunks.room(tenant) < need:
                level = 2
                self.counters.unrefined += 1
        if not self._prefixes.make_room(store.chunks, tenant, store.chunks_for(level)):
            return False  # nor is there a level without chunks: the page waits at level 0
        store.take_code(page, level, sink=first)
        first_token = page.index * store.layout.page_size
        draft.seals.append((page.raw, page.sealed, page.chunks, first_token, page.sink))
        if draft.shadows is not None:
            draft.shadows.append(self.shadows.choose(page, store.sealed.used))
        return True

    def _demote(self, page: Page, draft: Draft, cache: PagedCache | None) -> None:
        """Plans a demotion, if the page has something to forget."""
        if page.level != 1 or page.pending or page.sealed in draft.tables or self.config.levels < 3:
            return  # a page promoted by this very plan has no fine plane on the device yet
        store = self.store
        if cache is not None and store.host.budget_bytes:
            chunks = np.array(page.chunks, np.int32)
            planes = self._device.fine_planes(cache, chunks)
            store.host.put(page.uid, planes, page.tenant)
        store.forget_fine(page)
        page.votes.clear()
        draft.tables[page.sealed] = page.chunks
        self.counters.demotions += 1

    def _promote(self, page: Page, draft: Draft) -> bool:
        """Plans a promotion; False when it must be refused, or its plane is not in memory yet."""
        store = self.store
        if page.level != 2 or page.sealed == NONE or page.uid not in store.host:
            return False
        if store.chunks.room(page.tenant) < store.missing_chunks:
            return False
        if not store.host.ready(page.uid):
            self._waiting[page.uid] = page
            return False
        new = store.take_fine(page)
        draft.uploads.append((new, store.host.take(page.uid)))
        page.votes.clear()
        draft.tables[page.sealed] = page.chunks
        self.counters.promotions += 1
        return True
