"""The paged KV manager: sequences, pages, levels. Plain Python; keys and values never pass it."""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Sequence as ListOf

import numpy as np

from kvcompress_jax.config import CompressionConfig
from kvcompress_jax.manager import stats
from kvcompress_jax.manager.counters import Counters
from kvcompress_jax.manager.device import Device, JaxDevice
from kvcompress_jax.manager.draft import ENTRIES, Draft
from kvcompress_jax.manager.free_list import NO_SHARES
from kvcompress_jax.manager.heat_reader import HeatReader
from kvcompress_jax.manager.host_tier import Below
from kvcompress_jax.manager.level_control import LevelControl
from kvcompress_jax.manager.levels import Coldness
from kvcompress_jax.manager.lives import Lives
from kvcompress_jax.manager.page_store import PageStore
from kvcompress_jax.manager.preemption import Preemption
from kvcompress_jax.manager.prefix_cache import PrefixCache
from kvcompress_jax.manager.schedule import Schedule
from kvcompress_jax.manager.seals import Seals
from kvcompress_jax.manager.tables import TableRows
from kvcompress_jax.manager.verify import verify
from kvcompress_jax.paged.cache import PagedCache
from kvcompress_jax.paged.layout import CacheLayout, PoolSizes
from kvcompress_jax.paged.plan import Plan
from kvcompress_jax.paged.sharding import HeadSharding
from kvcompress_jax.paged.table import PageTable


class KVCacheManager:
    """Owns the page ids of one cache and decides about levels.

    One step of a serving loop:

        cache = manager.advance(cache)                # seals, demotes, promotes what is due
        slots = manager.append_slots(seq, tokens)     # room for the step's tokens
        table = manager.table([seq, ...])
        cache, ... = model_step(cache, table, slots)  # append, attend
        cache = manager.look_ahead(cache)             # while the device is busy

    Every method does all that it says, or raises and changes nothing.
    """

    def __init__(
        self,
        layout: CacheLayout,
        sizes: PoolSizes,
        config: CompressionConfig,
        *,
        max_sequences: int,
        fingerprint: str = "",
        tenant_shares: Mapping[str, float] = NO_SHARES,
        disk: Below | None = None,
        device: Device | None = None,
        coldness: Coldness | None = None,
        first_sequence_id: int = 0,
        sharding: HeadSharding | None = None,
    ) -> None:
        """
        Args:
          layout: of a page.
          sizes: of the pools.
          config: what is done with pages.
          max_sequences: that are on the device at the same time.
          fingerprint: of the model.
          tenant_shares: by tenant, part of every pool that is theirs at any time, and all that they
            get; tenants that are not named share the rest.
          disk: where fine planes go that find no room in host memory; None: they are lost.
          device: what holds the pools; None: JAX.
          coldness: in what order pages are demoted under pressure; None: by their heat.
          first_sequence_id: smallest id that a sequence gets.
          sharding: of the pools' heads; None: one device has all.

        Raises:
          ConfigError: the shares are more than there is.
        """
        self.layout = layout
        self.sizes = sizes
        self.config = config
        # What one of the devices has.
        self.devices = 1 if sharding is None else sharding.mesh.size
        self.device_layout = layout if sharding is None else sharding.local_layout(layout)
        self.device_sizes = sizes if sharding is None else sharding.local_sizes(sizes)
        self.device = JaxDevice(sharding) if device is None else device
        self.counters = Counters()
        self.store = store = PageStore(layout, sizes, config, max_sequences, tenant_shares, disk)
        self.raw, self.sealed, self.chunks = store.raw, store.sealed, store.chunks
        self.sinks, self.rows, self.host = store.sinks, store.rows, store.host
        self.sequences, self.pages = store.sequences, store.pages
        self._tables = TableRows(max_sequences)
        schedule = Schedule(store, config, self._tables.length)
        self._lives = Lives(store, self._tables, schedule, self.counters)
        self._lives.next_id = first_sequence_id
        self.prefixes = PrefixCache(
            store,
            self.counters,
            self.device,
            fingerprint=f"{fingerprint} {layout} {config}",
            window_tokens=config.window_tokens,
            sealed_level=config.sealed_level,
            host_bytes=config.prefix_cache_bytes or 0,
        )
        self._control = LevelControl(
            store,
            schedule,
            self.prefixes,
            config,
            self.counters,
            self.device,
            coldness,
        )
        self._seals = Seals(
            store,
            self._tables,
            self.counters,
            self.device,
            window_tokens=config.window_tokens,
        )
        self._preemption = Preemption(self._lives, self._seals, self.prefixes, self.device)
        self._heat = HeatReader(self.device, self._control)
        self.shadows = self._control.shadows

    # Sequences

    def add(self, tenant: str = "") -> int:
        """A new, empty sequence.

        Args:
          tenant: whose it is. Tenants share no pages, and the pages of one are not demoted for
            those of another.

        Raises:
          OutOfPagesError: `max_sequences`, or the tenant's share, are on the device already.
        """
        return self._lives.add(tenant).id

    def add_prompt(
        self, cache: PagedCache, tokens: ListOf[int], *, step_tokens: int, tenant: str = ""
    ) -> tuple[int, PagedCache]:
        """A new sequence that begins with the longest prefix of a prompt that is remembered; its
        `length` says how many tokens need not be fed any more. `cache` is donated.

        Args:
          cache: the cache.
          tokens: the prompt.
          step_tokens: it will be fed so many at a time; a prefix that was fed in other steps is
            another one (`kvcompress_jax.manager.prefix_cache`).
          tenant: whose it is; only its own prefixes are found.

        Raises:
          OutOfPagesError: no room for a sequence, or for the prefix's raw pages.
        """
        prefix = None
        if self.config.prefix_cache_bytes is not None:
            prefix = self.prefixes.find(tenant, tokens, step_tokens)
        if prefix is not None:
            self.raw.require(prefix.raw_pages, tenant)
        sequence = self._lives.add(tenant)
        if prefix is not None:
            raw, window = self.prefixes.join(sequence, prefix)
            if window is not None:
                cache = self.device.restore_raw(cache, raw, window)
            self._lives.refresh(sequence)
            if self.config.sealed_level == 1:
                low = [p for p in sequence.pages if p.level == 2 and p.uid in self.host]
                self._control.ask(1, low)
        return sequence.id, cache

    def remember(self, sequence_id: int, tokens: ListOf[int], cache: PagedCache) -> None:
        """Lets later prompts begin where this sequence is. Call it after each step of a prompt,
        when `advance` has done what is due; without a prefix cache it does nothing.

        Args:
          sequence_id: fed from its beginning, or from a prefix, with steps of a prompt only.
          tokens: all that it was fed.
          cache: read, to keep the raw pages of the window.

        Raises:
          ValueError: another number of tokens than the sequence has, or it is preempted.
        """
        sequence = self._lives.resident(sequence_id)
        if len(tokens) != sequence.length:
            raise ValueError(f"tokens: expected {sequence.length}, got {len(tokens)}")
        if self.config.prefix_cache_bytes is not None and self.config.compresses:
            merged = self.counters.pages_merged
            self.prefixes.remember(sequence, tokens, cache)
            if self.counters.pages_merged != merged:
                self._lives.refresh(sequence)

    @property
    def next_sequence_id(self) -> int:
        """Id of the next sequence; larger than all so far."""
        return self._lives.next_id

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

    def append_step(
        self, decoding: ListOf[int], prefilling: tuple[int, int] | None = None
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Room for a step of distinct sequences: all of it or none.

        Args:
          decoding: sequences that get one more token.
          prefilling: a sequence and how many tokens it gets.

        Returns:
          i32[decoding] positions and i32[decoding] slots of the tokens, i32[tokens] slots of the
          prefilling sequence.

        Raises:
          OutOfPagesError: too few raw pages for all of them together.
          ValueError: as `append_slots`.
        """
        chunk = np.zeros(0, np.int32)
        if prefilling is not None:
            sequence, tokens = self._lives.resident(prefilling[0]), prefilling[1]
            rows = self._lives.rows(decoding)
            starting = np.flatnonzero(self._tables.length[rows] % self.layout.page_size == 0)
            growing = [(self.sequences[decoding[i]], 1) for i in starting.tolist()]
            growing.append((sequence, self._lives.new_pages_for(sequence, tokens)))
            self._lives.require_raw(growing)
            chunk = self.append_slots(sequence.id, tokens)
        position, slots = self._lives.append_token_each(decoding)
        return position, slots, chunk

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
        """Ends a sequence; pages that no other one holds return to their pools, but for those of
        remembered prefixes, which stay until there is need of them."""
        sequence = self._lives.find(sequence_id)
        self._lives.free(sequence)
        self.prefixes.leave(sequence)

    def evict(self, sequence_id: int, indices: ListOf[int]) -> None:
        """Drops full pages of a sequence for good (lossy): it no longer attends to their tokens.
        The exact first tokens go with the first page.

        Raises:
          ValueError: an index is not that of a full page of this sequence.
        """
        sequence = self._lives.resident(sequence_id)
        self._lives.evict(sequence, indices)
        self.prefixes.leave(sequence)

    # Steps

    def advance(self, cache: PagedCache) -> PagedCache:
        """Plans, applies and confirms until nothing is due; `cache` is donated.

        What is due depends on the sequences' lengths alone, so that a sequence's pages are sealed
        at the same point of its life whoever else is there. How a seal ended is read when the page
        leaves the window, which waits for the step before where that is not over. Seals are started
        a token ahead, or by `look_ahead`; one that is started here, when it is due, is waited for.
        """
        self.commit(cache)
        self._heat.step(cache)
        return self._apply_due(cache, confirm=True)

    def look_ahead(self, cache: PagedCache) -> PagedCache:
        """Does what `advance` would do next, right after a model's step was put on the device: the
        host plans while the device computes, and `advance` has little left to do. Who attends to
        what stays as it is. Waits for nothing but seals that were started before that step, and
        starts others. `cache` is donated.

        Raises:
          RuntimeError: a plan that was made by `plan` was not confirmed, which would have to be
            waited for; nothing has changed.
        """
        self._seals.require_told("look_ahead")
        self._seals.settle(cache)
        return self._apply_due(cache, confirm=False)

    def _apply_due(self, cache: PagedCache, *, confirm: bool) -> PagedCache:
        while (plan := self.plan(cache)) is not None:
            cache, sealed = self.device.apply(cache, plan)
            self._seals.started(sealed)
            if confirm:
                self._seals.settle(cache)
            if not (self._control.more or self._lives.copies):
                break
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
        self._seals.require_told("plan")
        self.prefixes.settle()
        draft = Draft(shadows=[] if self.sizes.shadow_pages else None)
        copies = self._lives.copies
        draft.copies = [copies.pop(0) for _ in range(min(len(copies), ENTRIES))]
        self._control.fill(draft, cache)
        return draft.build(self.layout)

    def commit(self, cache: PagedCache) -> None:
        """Confirms the seals of pages that have left the window. The raw page of a sealed page is
        freed; a page with a value that is not finite stays at level 0 and is counted. After a plan
        that was not applied by `advance`, waits for the device."""
        self._seals.commit(cache)

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
        rows = self._lives.rows(sequence_ids)
        return self._tables.table(rows, padded_rows or len(rows), sealed_columns)

    def report_heat(self, heat: np.ndarray) -> None:
        """Takes `cache.heat`, f32[sealed_pages], possibly some steps old, as the heat of pages."""
        self._control.report_heat(heat, np.ones(len(heat), bool))

    # Levels on request

    def demote_pages(self, sequence_id: int, indices: ListOf[int]) -> None:
        """Asks the next plans for level 2. Pages that are not at level 1 stay as they are, and so
        do shared ones until all their owners asked: one does not decide for the others."""
        pages = [p for p in self._lives.find(sequence_id).pages if p.index in indices]
        for page in pages:
            page.votes.add(sequence_id)
        self._control.ask(2, [p for p in pages if p.votes >= p.owners])

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
        self._preemption.preempt(self._lives.resident(sequence_id), cache)

    def resume(self, sequence_id: int, cache: PagedCache) -> PagedCache:
        """Brings a preempted sequence back, bit for bit; `cache` is donated.

        Raises:
          OutOfPagesError: there is no room for it.
          ValueError: the sequence is not preempted.
        """
        return self._preemption.resume(self._lives.find(sequence_id), cache)

    # Reports

    def get_compression_stats(self) -> stats.CompressionStats:
        """Figures of the moment."""
        return stats.compression_stats(self)

    def verify(self, cache: PagedCache) -> None:
        """Checks every page, id and byte the manager claims against each other and the device.

        Raises:
          AssertionError: something does not add up; the message lists all of it.
        """
        verify(self, cache)
