"""The paged KV manager: sequences, pages, levels. Plain Python; keys and values never pass it."""

from collections.abc import Sequence as ListOf

import numpy as np

from kvcompress_jax.config import CompressionConfig
from kvcompress_jax.manager import stats, swap
from kvcompress_jax.manager.counters import Counters
from kvcompress_jax.manager.device import Device, JaxDevice
from kvcompress_jax.manager.draft import ENTRIES, Draft
from kvcompress_jax.manager.free_list import OutOfPagesError
from kvcompress_jax.manager.level_control import LevelControl
from kvcompress_jax.manager.lives import Lives
from kvcompress_jax.manager.page import NONE
from kvcompress_jax.manager.page_store import PageStore
from kvcompress_jax.manager.tables import TableRows
from kvcompress_jax.paged.cache import PagedCache
from kvcompress_jax.paged.layout import CacheLayout, PoolSizes
from kvcompress_jax.paged.plan import Plan
from kvcompress_jax.paged.table import PageTable


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
        device: Device | None = None,
    ) -> None:
        """
        Args:
          layout: of a page.
          sizes: of the pools.
          config: what is done with pages.
          max_sequences: that are on the device at the same time.
          device: what holds the pools; None: JAX.
        """
        self.layout = layout
        self.sizes = sizes
        self.config = config
        self.device = JaxDevice() if device is None else device
        self.counters = Counters()
        self.store = store = PageStore(layout, sizes, config, max_sequences)
        self.raw, self.sealed, self.chunks = store.raw, store.sealed, store.chunks
        self.sinks, self.rows, self.host = store.sinks, store.rows, store.host
        self.sequences, self.pages = store.sequences, store.pages
        self._tables = TableRows(max_sequences)
        self._lives = Lives(store, self._tables, self.counters)
        self._control = LevelControl(store, self._tables, config, self.counters, self.device)
        self.shadows = self._control.shadows

    # Sequences

    def add(self) -> int:
        """A new, empty sequence.

        Raises:
          OutOfPagesError: `max_sequences` are on the device already.
        """
        return self._lives.add().id

    def length(self, sequence_id: int) -> int:
        """Tokens of a sequence, the ones that slots were just handed out for included."""
        return self._lives.find(sequence_id).length

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
        return self._lives.append_slots(self._lives.resident(sequence_id), tokens)

    def append_slots_to_all(self, growth: ListOf[tuple[int, int]]) -> list[np.ndarray]:
        """`append_slots` for (sequence, tokens) pairs of distinct sequences: all of them or none.

        Raises:
          OutOfPagesError: too few raw pages for all of them together.
        """
        size = self.layout.page_size
        need = 0
        for sequence_id, tokens in growth:
            length = self._lives.resident(sequence_id).length
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
        return self._lives.fork(self._lives.resident(sequence_id)).id

    def free(self, sequence_id: int) -> None:
        """Ends a sequence; pages that no other one holds return to their pools."""
        self._lives.free(self._lives.find(sequence_id))

    def evict(self, sequence_id: int, indices: ListOf[int]) -> None:
        """Drops full pages of a sequence for good (lossy): it no longer attends to their tokens.
        The exact first tokens go with the first page.

        Raises:
          ValueError: an index is not that of a full page of this sequence.
        """
        self._lives.evict(self._lives.resident(sequence_id), indices)

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
            cache = self.device.apply(cache, plan)
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
        if self.store.pending:
            raise RuntimeError("plan: expected the last plan to be confirmed by commit()")
        self.host.settle()
        draft = Draft(shadows=[] if self.sizes.shadow_pages else None)
        copies = self._lives.copies
        draft.copies = [copies.pop(0) for _ in range(min(len(copies), ENTRIES))]
        self._control.fill(draft, cache)
        return draft.build(self.layout)

    def commit(self, cache: PagedCache) -> None:
        """Confirms the seals of the last plan. The raw page of a sealed page is freed; a page with
        a value that is not finite stays at level 0 and is counted."""
        self._control.commit(cache)

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
        rows = [self._lives.resident(i).row for i in sequence_ids]
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
        pages = self._lives.find(sequence_id).pages
        alone = {sequence_id}
        self._control.ask(2, (p for p in pages if p.index in indices and p.owners == alone))

    def promote_pages(self, sequence_id: int, indices: ListOf[int]) -> None:
        """Asks the next plans for level 1. A page whose fine plane was not kept, or that finds no
        free chunks, is refused and counted."""
        pages = self._lives.find(sequence_id).pages
        self._control.ask(1, (p for p in pages if p.index in indices))

    # Preemption

    def preempt(self, sequence_id: int, cache: PagedCache) -> None:
        """Moves a sequence to host memory and frees its pages; those that other sequences hold too
        stay on the device. Waits for the device.

        Raises:
          RuntimeError: a fork still waits for its plan.
          ValueError: the sequence is preempted already.
        """
        sequence = self._lives.resident(sequence_id)
        if self._lives.copies:
            raise RuntimeError("preempt: expected no forks that wait for a plan")
        self.commit(cache)
        own = [p for p in sequence.pages if p.owners == {sequence_id}]
        sequence.swapped = swap.out(self.device, cache, own)
        for page in own:
            self.store.return_code(page)
            self.store.return_raw(page)
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
        sequence = self._lives.find(sequence_id)
        if sequence.swapped is None:
            raise ValueError(f"sequence {sequence_id}: expected a preempted one")
        swapped = sequence.swapped
        need = swapped.needs()
        pools = (self.rows, self.raw, self.sealed, self.chunks, self.sinks)
        for pool, count in zip(pools, need, strict=True):
            if pool.free < count:
                raise OutOfPagesError(f"{pool.name}: expected {count} free, got {pool.free}")
        (sequence.row,), *ids = (pool.take(n) for pool, n in zip(pools, need, strict=True))
        cache = swapped.back(self.device, cache, *ids)
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
