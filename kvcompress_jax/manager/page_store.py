"""Which ids of which pool are whose."""

from kvcompress_jax.config import CompressionConfig
from kvcompress_jax.manager.free_list import FreeList
from kvcompress_jax.manager.host_tier import HostTier
from kvcompress_jax.manager.page import NONE, Page, Sequence
from kvcompress_jax.paged.layout import CacheLayout, PoolSizes


class PageStore:
    """The free lists, the pages and the sequences that own them.

    Attributes:
      raw, sealed, chunks, sinks, rows: free ids of each pool; a row is a sequence's on the device.
      host: what left the device and may come back.
      pages: by uid.
      sequences: by id.
      pending: pages whose seal is planned and not yet confirmed.
      floors: layers that never go below level 1.
    """

    def __init__(
        self, layout: CacheLayout, sizes: PoolSizes, config: CompressionConfig, max_sequences: int
    ) -> None:
        self.layout = layout
        self.sizes = sizes
        self.raw = FreeList("raw pages", sizes.raw_pages)
        self.sealed = FreeList("sealed pages", sizes.sealed_pages)
        self.chunks = FreeList("fine chunks", sizes.fine_chunks)
        self.sinks = FreeList("sink slots", sizes.sink_slots)
        self.rows = FreeList("sequences", max_sequences)
        self.host = HostTier(config.host_bytes)
        self.floors = frozenset(i % layout.layers for i in config.floor_layers)
        self.pages: dict[int, Page] = {}
        self.sequences: dict[int, Sequence] = {}
        self.pending: list[Page] = []
        self._next_uid = 0

    def new_page(self, index: int, raw: int) -> Page:
        """A page of nobody on a raw page."""
        page = Page(uid=self._next_uid, index=index, raw=raw)
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
        if page.owners:
            return
        if page.pending:
            self.pending.remove(page)
        self.return_raw(page)
        self.return_code(page)
        self.host.drop(page.uid)
        del self.pages[page.uid]

    def return_raw(self, page: Page) -> None:
        """Gives back the raw page, if there is one."""
        if page.raw != NONE:
            self.raw.give_back([page.raw])
            page.raw = NONE

    def return_code(self, page: Page) -> None:
        """Gives back everything of the page's code: it has none any more."""
        if page.sealed != NONE:
            self.sealed.give_back([page.sealed])
        if page.sink != NONE:
            self.sinks.give_back([page.sink])
        self.chunks.give_back(c for c in page.chunks if c != NONE)
        page.sealed, page.sink = NONE, NONE
        page.chunks = ()
        page.level = 0

    def age(self, page: Page) -> int:
        """Tokens after the page's last one, in the owner that has the fewest."""
        shortest = min(self.sequences[owner].length for owner in page.owners)
        return shortest - (page.index + 1) * self.layout.page_size

    def chunks_for(self, level: int) -> int:
        """Fine chunks of a page at a level."""
        return {1: self.layout.layers, 2: len(self.floors), 3: 0}[level]

    @property
    def missing_chunks(self) -> int:
        """What a page at level 2 needs for level 1."""
        return self.chunks_for(1) - self.chunks_for(2)

    def take_chunks(self, level: int) -> tuple[int, ...]:
        """Chunks for a page at a level: an id or NONE for each layer."""
        ids = iter(self.chunks.take(self.chunks_for(level)))
        layers = range(self.layout.layers)
        return tuple(next(ids) if level == 1 or i in self.floors else NONE for i in layers)
