"""The paged KV manager: sequences, pages, levels. Plain Python; keys and values never pass it."""

import logging
from collections.abc import Sequence as ListOf

import jax
import numpy as np

from kvcompress_jax.codec import NonFiniteError, check_finite
from kvcompress_jax.config import CompressionConfig
from kvcompress_jax.manager import levels, stats, swap
from kvcompress_jax.manager.counters import Counters
from kvcompress_jax.manager.draft import ENTRIES, UPLOADS, Draft
from kvcompress_jax.manager.free_list import FreeList, OutOfPagesError
from kvcompress_jax.manager.host_tier import HostTier
from kvcompress_jax.manager.page import NONE, Page, Sequence
from kvcompress_jax.manager.shadows import Shadows
from kvcompress_jax.manager.tables import TableRows
from kvcompress_jax.paged.cache import PagedCache
from kvcompress_jax.paged.layout import CacheLayout, PoolSizes
from kvcompress_jax.paged.plan import Plan, apply_plan
from kvcompress_jax.paged.table import PageTable

logger = logging.getLogger(__name__)

_apply_plan = jax.jit(apply_plan, donate_argnums=0)
_fine_planes = jax.jit(lambda cache, chunks: cache.fine[chunks])


class KVCacheManager:
    """Owns the page ids of one cache and decides about levels.

    One step of a serving loop:

        cache = manager.advance(cache)                # seals, demotes, promotes what is due
        slots = manager.append_slots(seq, tokens)     # room for the step's tokens
        table = manager.table([seq, ...])
        cache, ... = model_step(cache, table, slots)  # append, attend

    Every method does all that it says, or raises and changes nothing.
    """

    def __init__(
        self,
        layout: CacheLayout,
        sizes: PoolSizes,
        config: CompressionConfig,
        *,
        max_sequences: int,
    ) -> None:
        self.layout = layout
        self.sizes = sizes
        self.config = config
        self.counters = Counters()
        self.raw = FreeList("raw pages", sizes.raw_pages)
        self.sealed = FreeList("sealed pages", sizes.sealed_pages)
        self.chunks = FreeList("fine chunks", sizes.fine_chunks)
        self.sinks = FreeList("sink slots", sizes.sink_slots)
        self.rows = FreeList("sequences", max_sequences)
        self.host = HostTier(config.host_bytes)
        self.shadows = Shadows(sizes.shadow_pages, config.telemetry_share)
        self.floors = frozenset(i % layout.layers for i in config.floor_layers)
        self.sequences: dict[int, Sequence] = {}
        self.pages: dict[int, Page] = {}  # by uid
        self._tables = TableRows(max_sequences)
        self._copies: list[tuple[int, int]] = []
        self._pending: list[Page] = []
        self._asked: list[tuple[int, Page]] = []
        self._next_uid = 0
        self._next_id = 0

    # Sequences

    def add(self) -> int:
        """A new, empty sequence.

        Raises:
          OutOfPagesError: `max_sequences` are on the device already.
        """
        (row,) = self.rows.take()
        sequence = Sequence(id=self._next_id, row=row)
        self._next_id += 1
        self.sequences[sequence.id] = sequence
        self._tables.refresh(sequence)
        return sequence.id

    def length(self, sequence_id: int) -> int:
        """Tokens of a sequence, the ones that slots were just handed out for included."""
        return self._sequence(sequence_id).length

    def append_slots(self, sequence_id: int, tokens: int) -> np.ndarray:
        """Room for a sequence's next tokens: slots for `kvcompress_jax.paged.append`.

        Returns:
          i32[tokens].

        Raises:
          OutOfPagesError: too few raw pages; preempt a sequence, then try again.
          ValueError: tokens < 1, or the sequence is preempted.
        """
        if tokens < 1:
            raise ValueError(f"tokens: expected at least 1, got {tokens}")
        sequence = self._resident(sequence_id)
        size = self.layout.page_size
        position = np.arange(sequence.length, sequence.length + tokens)
        have = -(-sequence.length // size)
        new = self.raw.take(-(-(sequence.length + tokens) // size) - have)
        for index, raw in enumerate(new, start=have):
            self._adopt(sequence, self._new_page(index, raw))
        sequence.length += tokens
        if new:
            self._tables.refresh(sequence)
        else:
            self._tables.lengthen(sequence)
        first = int(position[0]) // size
        raw_of = np.array([p.raw for p in sequence.pages[-len(new) - 1 :] if p.index >= first])
        return (raw_of[position // size - first] * size + position % size).astype(np.int32)

    def append_slots_to_all(self, growth: ListOf[tuple[int, int]]) -> list[np.ndarray]:
        """`append_slots` for (sequence, tokens) pairs of distinct sequences: all of them or none.

        Raises:
          OutOfPagesError: too few raw pages for all of them together.
        """
        size = self.layout.page_size
        need = 0
        for sequence_id, tokens in growth:
            length = self._resident(sequence_id).length
            need += -(-(length + tokens) // size) - -(-length // size)
        if need > self.raw.free:
            raise OutOfPagesError(f"raw pages: expected {need} free, got {self.raw.free}")
        return [self.append_slots(sequence_id, tokens) for sequence_id, tokens in growth]

    def fork(self, sequence_id: int) -> int:
        """A second sequence with the same tokens. Full pages are shared; an unfinished one is
        copied by the next plan, which must be applied before either sequence grows.

        Returns:
          The id of the new sequence.

        Raises:
          OutOfPagesError: no room for a sequence, or no raw page for the copy.
        """
        parent = self._resident(sequence_id)
        partial = parent.length % self.layout.page_size != 0
        copies = self.raw.take(1 if partial else 0)
        try:
            child = self.sequences[self.add()]
        except OutOfPagesError:
            self.raw.give_back(copies)
            raise
        for page in parent.pages[: len(parent.pages) - len(copies)]:
            self._adopt(child, page)
        for raw in copies:
            last = parent.pages[-1]
            self._adopt(child, self._new_page(last.index, raw))
            self._copies.append((last.raw, raw))
        child.length, child.settled = parent.length, parent.settled
        self.counters.forks += 1
        self._tables.refresh(child)
        return child.id

    def free(self, sequence_id: int) -> None:
        """Ends a sequence; pages that no other one holds return to their pools."""
        sequence = self._sequence(sequence_id)
        for page in sequence.pages:
            self._disown(sequence, page)
        if sequence.row != NONE:
            self._tables.clear(sequence.row)
            self.rows.give_back([sequence.row])
        del self.sequences[sequence_id]

    def evict(self, sequence_id: int, indices: ListOf[int]) -> None:
        """Drops full pages of a sequence for good (lossy): it no longer attends to their tokens.
        The exact first tokens go with the first page.

        Raises:
          ValueError: an index is not that of a full page of this sequence.
        """
        sequence = self._resident(sequence_id)
        pages = {p.index: p for p in sequence.pages}
        for i in indices:
            if i not in pages or (i + 1) * self.layout.page_size > sequence.length:
                raise ValueError(f"indices: expected full pages of the sequence, got {i}")
        for i in set(indices):
            sequence.pages.remove(pages[i])
            self._disown(sequence, pages[i])
        sequence.settled = 0
        self.counters.evictions += len(set(indices))
        self._tables.refresh(sequence)

    # Steps

    def advance(self, cache: PagedCache) -> PagedCache:
        """Plans, applies and confirms until nothing is due; `cache` is donated.

        What is due depends on the sequences' lengths alone, so that a sequence's pages are sealed
        at the same point of its life whoever else is there. Reading whether seals succeeded waits
        for the device, in steps in which pages were sealed; loops that must never wait use `plan`,
        `apply_plan` and a later `commit`.
        """
        self.commit(cache)
        while (plan := self.plan(cache)) is not None:
            cache = _apply_plan(cache, plan)
            self.commit(cache)
        return cache

    def plan(self, cache: PagedCache | None = None) -> Plan | None:
        """Decides what is due; None when nothing is. The plan must be applied before tokens are
        appended, and confirmed before the next plan.

        Args:
          cache: read only to keep the fine planes of demoted pages in host memory; with None
            they are not kept.

        Raises:
          RuntimeError: the last plan was not confirmed.
        """
        if self._pending:
            raise RuntimeError("plan: expected the last plan to be confirmed by commit()")
        self.host.settle()
        draft = Draft(shadows=[] if self.sizes.shadow_pages else None)
        draft.copies = [self._copies.pop(0) for _ in range(min(len(self._copies), ENTRIES))]
        while self._asked and len(draft.tables) < ENTRIES and len(draft.uploads) < UPLOADS:
            level, page = self._asked.pop(0)
            if page.uid in self.pages:
                if level == 2:
                    self._demote(page, draft, cache)
                elif not self._promote(page, draft):
                    self.counters.refusals += 1
        if self.config.demote_after_tokens is not None:
            pages = list(self.pages.values())
            for page in levels.aged(pages, [self._age(p) for p in pages], self.config):
                if len(draft.tables) < ENTRIES:
                    self._demote(page, draft, cache)
        candidates = self.pages.values() if len(self.host) else ()
        for page in levels.hot(candidates, self.host, self.config):
            if len(draft.uploads) == UPLOADS:
                break
            cold = levels.coldest(self.pages.values())
            if (
                self.chunks.free < self._missing_chunks
                and cold
                and levels.displaces(page, cold[0], self.config)
            ):
                self._demote(cold[0], draft, cache)
            if not self._promote(page, draft):
                break
        for page in self._due():
            if len(draft.seals) == ENTRIES or not self._seal(page, draft, cache):
                break
        return draft.build(self.layout)

    def commit(self, cache: PagedCache) -> None:
        """Confirms the seals of the last plan. The raw page of a sealed page is freed; a page with
        a value that is not finite stays at level 0 and is counted."""
        if not self._pending:
            return
        sealed = np.asarray(cache.sealed)
        pending, self._pending = self._pending, []
        for page in pending:
            page.pending = False
            if sealed[page.sealed]:
                self.raw.give_back([page.raw])
                page.raw = NONE
                self.counters.seals += 1
            else:
                self._return_code(page)
                page.unsealable = True
                self.counters.rejected += 1
                logger.warning("page stays at level 0: %s", _what_is_not_finite(cache, page))
        for owner in set().union(*(p.owners for p in pending)):
            if self.sequences[owner].row != NONE:
                self._tables.refresh(self.sequences[owner])

    def table(
        self,
        sequence_ids: ListOf[int],
        *,
        padded_rows: int | None = None,
        sealed_columns: int | None = None,
    ) -> PageTable:
        """The page table of a batch, as NumPy arrays.

        Args:
          sequence_ids: the batch.
          padded_rows: rows of the table; rows past the batch are empty. None: no more.
          sealed_columns: width of the table of sealed pages, at least what the batch needs. None:
            the next power of two, so that one compiled program serves many steps.

        Raises:
          ValueError: a sequence is preempted.
        """
        rows = [self._resident(i).row for i in sequence_ids]
        return self._tables.table(rows, padded_rows or len(rows), sealed_columns)

    def report_heat(self, heat: np.ndarray) -> None:
        """Takes `cache.heat`, f32[sealed_pages], possibly some steps old, as the heat of pages."""
        for page in self.pages.values():
            if page.sealed != NONE:
                page.heat = float(heat[page.sealed])

    # Levels on request

    def demote_pages(self, sequence_id: int, indices: ListOf[int]) -> None:
        """Asks the next plans for level 2. Pages that are not at level 1 stay as they are, and so
        do shared ones: one owner does not decide for the others."""
        for page in self._sequence(sequence_id).pages:
            if page.index in indices and page.owners == {sequence_id}:
                self._asked.append((2, page))

    def promote_pages(self, sequence_id: int, indices: ListOf[int]) -> None:
        """Asks the next plans for level 1. A page whose fine plane was not kept, or that finds no
        free chunks, is refused and counted."""
        for page in self._sequence(sequence_id).pages:
            if page.index in indices:
                self._asked.append((1, page))

    # Preemption

    def preempt(self, sequence_id: int, cache: PagedCache) -> None:
        """Moves a sequence to host memory and frees its pages; those that other sequences hold too
        stay on the device. Waits for the device.

        Raises:
          RuntimeError: a fork still waits for its plan.
          ValueError: the sequence is preempted already.
        """
        sequence = self._resident(sequence_id)
        if self._copies:
            raise RuntimeError("preempt: expected no forks that wait for a plan")
        self.commit(cache)
        own = [p for p in sequence.pages if p.owners == {sequence_id}]
        sequence.swapped = swap.out(cache, own)
        for page in own:
            self._return_code(page)
            if page.raw != NONE:
                self.raw.give_back([page.raw])
                page.raw = NONE
        self._tables.clear(sequence.row)
        self.rows.give_back([sequence.row])
        sequence.row = NONE
        self.counters.preemptions += 1

    def resume(self, sequence_id: int, cache: PagedCache) -> PagedCache:
        """Brings a preempted sequence back, bit for bit; `cache` is donated.

        Raises:
          OutOfPagesError: there is no room for it.
          ValueError: the sequence is not preempted.
        """
        sequence = self._sequence(sequence_id)
        if sequence.swapped is None:
            raise ValueError(f"sequence {sequence_id}: expected a preempted one")
        swapped = sequence.swapped
        need = swapped.needs()
        pools = (self.rows, self.raw, self.sealed, self.chunks, self.sinks)
        for pool, count in zip(pools, need, strict=True):
            if pool.free < count:
                raise OutOfPagesError(f"{pool.name}: expected {count} free, got {pool.free}")
        (sequence.row,), *ids = (pool.take(n) for pool, n in zip(pools, need, strict=True))
        cache = swapped.back(cache, *ids)
        sequence.swapped = None
        self._tables.refresh(sequence)
        self.counters.resumes += 1
        return cache

    # Reports

    def get_compression_stats(self) -> stats.CompressionStats:
        """Figures of the moment."""
        return stats.compression_stats(self)

    def verify(self, cache: PagedCache) -> None:
        """Checks every page, id and byte the manager claims against each other and the device.

        Raises:
          AssertionError: something does not add up; the message lists all of it.
        """
        stats.verify(self, cache)

    # Pages

    def _sequence(self, sequence_id: int) -> Sequence:
        if sequence_id not in self.sequences:
            raise ValueError(f"sequence: expected a live one, got {sequence_id}")
        return self.sequences[sequence_id]

    def _resident(self, sequence_id: int) -> Sequence:
        sequence = self._sequence(sequence_id)
        if sequence.swapped is not None:
            raise ValueError(f"sequence {sequence_id}: expected one on the device, it is preempted")
        return sequence

    def _new_page(self, index: int, raw: int) -> Page:
        page = Page(uid=self._next_uid, index=index, raw=raw)
        self._next_uid += 1
        self.pages[page.uid] = page
        return page

    def _adopt(self, sequence: Sequence, page: Page) -> None:
        sequence.pages.append(page)
        page.owners.add(sequence.id)

    def _disown(self, sequence: Sequence, page: Page) -> None:
        page.owners.discard(sequence.id)
        if page.owners:
            return
        if page.pending:
            self._pending.remove(page)
        if page.raw != NONE:
            self.raw.give_back([page.raw])
        self._return_code(page)
        self.host.drop(page.uid)
        del self.pages[page.uid]

    def _return_code(self, page: Page) -> None:
        """Gives back everything of the page's code: it has none any more."""
        if page.sealed != NONE:
            self.sealed.give_back([page.sealed])
        if page.sink != NONE:
            self.sinks.give_back([page.sink])
        self.chunks.give_back(c for c in page.chunks if c != NONE)
        page.sealed, page.sink = NONE, NONE
        page.chunks = ()
        page.level = 0

    def _age(self, page: Page) -> int:
        """Tokens after the page's last one, in the owner that has the fewest."""
        shortest = min(self.sequences[owner].length for owner in page.owners)
        return shortest - (page.index + 1) * self.layout.page_size

    def _due(self) -> list[Page]:
        """Raw pages that left the window of all their owners, each once, oldest first."""
        if not self.config.compresses:
            return []
        due = {}
        for sequence in self.sequences.values():
            if sequence.swapped is not None:
                continue
            pages = sequence.pages
            while sequence.settled < len(pages) and (
                pages[sequence.settled].sealed != NONE or pages[sequence.settled].unsealable
            ):
                sequence.settled += 1
            for page in pages[sequence.settled :]:
                end = (page.index + 1) * self.layout.page_size
                if sequence.length - end < self.config.window_tokens:
                    break
                at_rest = page.sealed != NONE or page.unsealable
                if not at_rest and self._age(page) >= self.config.window_tokens:
                    due[page.uid] = page
        return list(due.values())

    def _chunks_for(self, level: int) -> int:
        return {1: self.layout.layers, 2: len(self.floors), 3: 0}[level]

    @property
    def _missing_chunks(self) -> int:
        """What a page at level 2 needs for level 1."""
        return self._chunks_for(1) - self._chunks_for(2)

    def _take_chunks(self, level: int) -> tuple[int, ...]:
        ids = iter(self.chunks.take(self._chunks_for(level)))
        layers = range(self.layout.layers)
        return tuple(next(ids) if level == 1 or i in self.floors else NONE for i in layers)

    def _seal(self, page: Page, draft: Draft, cache: PagedCache | None) -> bool:
        """Plans a seal; False when there is no room for one."""
        first = page.index == 0 and self.layout.sink_tokens > 0
        if not self.sealed.free or (first and not self.sinks.free):
            return False
        level = self.config.sealed_level
        if level == 1:
            # Under pressure the coldest pages make room for the new one.
            for cold in levels.coldest(self.pages.values()):
                if self.chunks.free >= self._chunks_for(1) or len(draft.tables) == ENTRIES:
                    break
                self._demote(cold, draft, cache)
            if self.chunks.free < self._chunks_for(1):
                level = 2
                self.counters.unrefined += 1
        if self.chunks.free < self._chunks_for(level):
            return False  # a floor layer without its chunk: the page waits at level 0
        page.chunks = self._take_chunks(level)
        (page.sealed,) = self.sealed.take()
        if first:
            (page.sink,) = self.sinks.take()
        page.level, page.heat, page.pending = level, 0.0, True
        self._pending.append(page)
        first_token = page.index * self.layout.page_size
        draft.seals.append((page.raw, page.sealed, page.chunks, first_token, page.sink))
        if draft.shadows is not None:
            draft.shadows.append(self.shadows.choose(page, self.sealed.used))
        return True

    def _demote(self, page: Page, draft: Draft, cache: PagedCache | None) -> None:
        if page.level != 1 or page.pending or page.sealed in draft.tables or self.config.levels < 3:
            return  # a page promoted by this very plan has no fine plane on the device yet
        if cache is not None and self.config.host_bytes:
            self.host.put(page.uid, _fine_planes(cache, np.array(page.chunks, np.int32)))
        kept = tuple(c if i in self.floors else NONE for i, c in enumerate(page.chunks))
        self.chunks.give_back(set(page.chunks) - set(kept))
        page.chunks, page.level = kept, 2
        draft.tables[page.sealed] = kept
        self.counters.demotions += 1

    def _promote(self, page: Page, draft: Draft) -> bool:
        """Plans a promotion; False when it must be refused."""
        if page.level != 2 or page.uid not in self.host:
            return False
        if self.chunks.free < self._missing_chunks:
            return False
        ids = iter(self.chunks.take(self._missing_chunks))
        new = tuple(next(ids) if c == NONE else NONE for c in page.chunks)
        draft.uploads.append((new, self.host.take(page.uid)))
        page.chunks = tuple(max(a, b) for a, b in zip(page.chunks, new, strict=True))
        page.level = 1
        draft.tables[page.sealed] = page.chunks
        self.counters.promotions += 1
        return True


def _what_is_not_finite(cache: PagedCache, page: Page) -> str:
    """Names layer, head and page of the first value that is not finite."""
    for layer, kv in enumerate(cache.raw[:, page.raw]):
        for name, x in (("keys", kv[0]), ("values", kv[1])):
            try:
                check_finite(name, x[None], layer=layer, first_page=page.index)
            except NonFiniteError as e:
                return str(e)
    return f"page {page.index}: expected values that a calibrated code can hold"
