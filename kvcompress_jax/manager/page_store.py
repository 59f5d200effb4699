"""Which ids of which pool are whose, and what is known of every sealed page."""

from collections.abc import Mapping

import numpy as np

from kvcompress_jax.config import CompressionConfig, ConfigError
from kvcompress_jax.manager.free_list import NO_SHARES, FreeList
from kvcompress_jax.manager.host_tier import Below, HostTier
from kvcompress_jax.manager.page import NONE, Page, Sequence
from kvcompress_jax.manager.seals import Outcome
from kvcompress_jax.paged.layout import CacheLayout, PoolSizes


class PageStore:
    """The free lists, the pages and the sequences that own them.

    Attributes:
      raw, sealed, chunks, sinks, rows: free ids of each pool; a row is a sequence's on the device.
      host: what left the device and may come back.
      pages: by uid.
      sequences: by id; `by_row` those on the device.
      pending: pages whose seal is planned and not yet confirmed, in that order, and how it ends;
        None while nobody told (`kvcompress_jax.manager.seals`).
      floors: layers that never go below level 1.
      holder: page of each sealed page in use.
      uid: i64[sealed_pages], of the page.
      tenant: i32[sealed_pages], number of its tenant in `tenants`.
      level: i8[sealed_pages], 0 for those that are not in use or pending.
      heat: f32[sealed_pages], decayed attention mass; `typical_heat` is the median of those in use.
      fresh: bool[sealed_pages], sealed after the last look at the heat on the device began.
      old: bool[sealed_pages], old enough for level 2 in some owner.
    """

    def __init__(
        self,
        layout: CacheLayout,
        sizes: PoolSizes,
        config: CompressionConfig,
        max_sequences: int,
        shares: Mapping[str, float] = NO_SHARES,
        disk: Below | None = None,
    ) -> None:
        if any(not 0 < share <= 1 for share in shares.values()) or sum(shares.values()) > 1:
            raise ConfigError(
                f"tenant_shares: expected more than 0 each and at most 1 in all, got {dict(shares)}"
            )
        self.layout = layout
        self.sizes = sizes
        self.shares = shares
        self.raw = FreeList("raw pages", sizes.raw_pages, shares)
        self.sealed = FreeList("sealed pages", sizes.sealed_pages, shares)
        self.chunks = FreeList("fine chunks", sizes.fine_chunks, shares)
        self.sinks = FreeList("sink slots", sizes.sink_slots, shares)
        self.rows = FreeList("sequences", max_sequences, shares)
        self.host = HostTier(config.host_bytes, shares, disk)
        self.floors = config.floors(layout.layers)
        self.pages: dict[int, Page] = {}
        self.sequences: dict[int, Sequence] = {}
        self.by_row: list[Sequence | None] = [None] * max_sequences
        self.pending: dict[Page, Outcome | None] = {}
        self.holder: list[Page | None] = [None] * sizes.sealed_pages
        self.level = np.zeros(sizes.sealed_pages, np.int8)
        self.heat = np.zeros(sizes.sealed_pages, np.float32)
        self.fresh = np.zeros(sizes.sealed_pages, bool)
        self.old = np.zeros(sizes.sealed_pages, bool)
        self.uid = np.zeros(sizes.sealed_pages, np.int64)
        self.tenant = np.zeros(sizes.sealed_pages, np.int32)
        self.tenants: dict[str, int] = {}
        self.typical_heat = 0.0
        self._next_uid = 0
        self._no_chunks = (NONE,) * layout.layers
        self._chunks_for = (0, layout.layers, len(self.floors), 0)  # by level

    # Pages and owners

    def new_page(self, index: int, raw: int, tenant: str) -> Page:
        """A page of nobody on a raw page."""
        page = Page(uid=self._next_uid, index=index, raw=raw, tenant=tenant)
        self._next_uid += 1
        self.pages[page.uid] = page
        return page

    def adopt(self, sequence: Sequence, page: Page) -> None:
        """The sequence holds the page, as its last one."""
        sequence.pages.append(page)
        page.owners.add(sequence.id)

    def disown(self, sequence: Sequence, page: Page) -> None:
        """The sequence no longer holds the page, which goes when nobody does."""
        page.owners.discard(sequence.id)
        page.votes.discard(sequence.id)
        self.release(page)

    def release(self, page: Page) -> None:
        """Frees a page that nobody holds."""
        if page.owners or page.kept:
            return
        self.return_raw(page)
        self.return_code(page)
        self.host.drop(page.uid)
        del self.pages[page.uid]

    def age(self, page: Page) -> int:
        """Tokens after the page's last one, in the owner that has the fewest; a page that only the
        prefix cache holds does not age."""
        if not page.owners:
            return NONE
        shortest = min(self.sequences[owner].length for owner in page.owners)
        return shortest - (page.index + 1) * self.layout.page_size

    # Codes

    def return_raw(self, page: Page) -> None:
        """Gives back the raw page, if there is one."""
        if page.raw != NONE:
            self.raw.give_back([page.raw], page.tenant)
            page.raw = NONE

    def take_code(self, page: Page, level: int, *, sink: bool) -> None:
        """Gives a raw page what its code needs; it is `pending` then. There must be room."""
        page.chunks = self._take_chunks(level, page.tenant)
        (page.sealed,) = self.sealed.take(1, page.tenant)
        if sink:
            (page.sink,) = self.sinks.take(1, page.tenant)
        page.level, page.pending = level, True
        self._enter(page, self.typical_heat)  # nothing is known yet
        self.pending[page] = None

    def confirm(self, page: Page) -> None:
        """The code is there: the raw page goes."""
        self._end_seal(page)
        self.level[page.sealed] = page.level
        self.return_raw(page)

    def put_code(self, page: Page, sealed: int, level: int, heat: float) -> None:
        """A page whose code left the device is back at another id."""
        page.sealed, page.level = sealed, level
        self._enter(page, heat)
        self.level[sealed] = level

    def return_code(self, page: Page) -> None:
        """Gives back everything of the page's code: it has none any more."""
        if page.sealed != NONE:
            self.holder[page.sealed] = None
            self.level[page.sealed] = 0
            self.sealed.give_back([page.sealed], page.tenant)
        if page.sink != NONE:
            self.sinks.give_back([page.sink], page.tenant)
        self.chunks.give_back([c for c in page.chunks if c != NONE], page.tenant)
        page.sealed, page.sink = NONE, NONE
        page.chunks = ()
        page.level = 0
        self._end_seal(page)

    def forget_fine(self, page: Page) -> None:
        """Level 1 to 2: all chunks but those of the floor layers are given back."""
        gone, kept = page.chunks, self._no_chunks
        if self.floors:
            kept = tuple(c if i in self.floors else NONE for i, c in enumerate(gone))
            gone = tuple(c for i, c in enumerate(gone) if i not in self.floors)
        self.chunks.give_back(gone, page.tenant)
        page.chunks, page.level = kept, 2
        self.level[page.sealed] = 2

    def take_fine(self, page: Page) -> tuple[int, ...]:
        """Level 2 to 1: chunks for the layers that have none, NONE for the others."""
        ids = iter(self.chunks.take(self.missing_chunks, page.tenant))
        new = tuple(next(ids) if c == NONE else NONE for c in page.chunks)
        page.chunks = tuple(max(a, b) for a, b in zip(page.chunks, new, strict=True))
        page.level = 1
        self.level[page.sealed] = 1
        return new

    def chunks_for(self, level: int) -> int:
        """Fine chunks of a page at a level."""
        return self._chunks_for[level]

    @property
    def missing_chunks(self) -> int:
        """What a page at level 2 needs for level 1."""
        return self._chunks_for[1] - self._chunks_for[2]

    def _end_seal(self, page: Page) -> None:
        page.pending = False
        self.pending.pop(page, None)

    def _enter(self, page: Page, heat: float) -> None:
        at = page.sealed
        self.holder[at] = page
        self.uid[at] = page.uid
        self.tenant[at] = self.tenants.setdefault(page.tenant, len(self.tenants))
        self.level[at] = 0
        self.heat[at] = heat
        self.fresh[at], self.old[at] = True, False

    def _take_chunks(self, level: int, tenant: str) -> tuple[int, ...]:
        taken = self.chunks.take(self.chunks_for(level), tenant)
        if level == 1:
            return tuple(taken)
        ids = iter(taken)
        return tuple(next(ids) if i in self.floors else NONE for i in range(self.layout.layers))
