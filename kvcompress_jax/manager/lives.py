"""Sequences begin, grow, fork, lose pages and end."""

from collections.abc import Sequence as ListOf

import numpy as np

from kvcompress_jax.manager.counters import Counters
from kvcompress_jax.manager.free_list import OutOfPagesError
from kvcompress_jax.manager.page import NONE, Sequence
from kvcompress_jax.manager.page_store import PageStore
from kvcompress_jax.manager.schedule import Schedule
from kvcompress_jax.manager.tables import TableRows


class Lives:
    """What happens to sequences; the public methods of `KVCacheManager` say what each promises."""

    def __init__(
        self, store: PageStore, tables: TableRows, schedule: Schedule, counters: Counters
    ) -> None:
        self.store = store
        self.counters = counters
        self.copies: list[tuple[int, int]] = []  # raw pages that a plan must copy for forks
        self._tables = tables
        self._schedule = schedule
        self.next_id = 0
        self._batch: tuple[list[int], np.ndarray] = ([], np.zeros(0, np.int64))

    def find(self, sequence_id: int) -> Sequence:
        """The sequence, ValueError if there is none."""
        if sequence_id not in self.store.sequences:
            raise ValueError(f"sequence: expected a live one, got {sequence_id}")
        return self.store.sequences[sequence_id]

    def resident(self, sequence_id: int) -> Sequence:
        """The sequence, ValueError if it is not on the device."""
        sequence = self.find(sequence_id)
        if sequence.swapped is not None:
            raise ValueError(f"sequence {sequence_id}: expected one on the device, it is preempted")
        return sequence

    def rows(self, sequence_ids: ListOf[int]) -> np.ndarray:
        """i64[sequences], their rows; most calls are for the sequences of the last one, or for one
        whose prompt is fed beside them."""
        if len(sequence_ids) == 1:
            return np.array([self.resident(sequence_ids[0]).row], np.int64)
        if sequence_ids != self._batch[0]:
            rows = [self.resident(i).row for i in sequence_ids]
            self._batch = (list(sequence_ids), np.array(rows, np.int64))
        return self._batch[1]

    def add(self, tenant: str) -> Sequence:
        """A new, empty sequence."""
        (row,) = self.store.rows.take(1, tenant)
        sequence = Sequence(id=self.next_id, row=row, lengths=self._tables.length, tenant=tenant)
        self.next_id += 1
        self.store.sequences[sequence.id] = sequence
        self.store.by_row[row] = sequence
        self.refresh(sequence)
        return sequence

    def refresh(self, sequence: Sequence) -> None:
        """The pages of a sequence changed: its table and what is due for it are made anew."""
        if sequence.row != NONE:
            self._tables.refresh(sequence)
            self._schedule.reset(sequence)

    def leave_row(self, sequence: Sequence) -> None:
        """The sequence is no longer on the device."""
        row = sequence.row
        sequence.move(NONE)
        self._tables.clear(row)
        self._schedule.clear(row)
        self.store.by_row[row] = None
        self.store.rows.give_back([row], sequence.tenant)
        self._batch = ([], np.zeros(0, np.int64))

    def enter_row(self, sequence: Sequence, row: int) -> None:
        """The sequence is on the device again."""
        sequence.move(row)
        self.store.by_row[row] = sequence
        self.refresh(sequence)

    def append_slots(self, sequence: Sequence, tokens: int) -> np.ndarray:
        """i32[tokens], room for the next tokens."""
        size = self.store.layout.page_size
        length = sequence.length
        position = np.arange(length, length + tokens)
        first = length // size  # page of the first new token
        have = -(-length // size)
        new = self.store.raw.take(-(-(length + tokens) // size) - have, sequence.tenant)
        raw_of = [] if have == first else [self._tables.last_raw[sequence.row]]
        for index, raw in enumerate(new, start=have):
            page = self.store.new_page(index, raw, sequence.tenant)
            self.store.adopt(sequence, page)
            self._tables.add_raw(sequence.row, page)
            raw_of.append(raw)
        sequence.length = length + tokens
        return (np.array(raw_of)[position // size - first] * size + position % size).astype(
            np.int32
        )

    def append_token_each(self, sequence_ids: ListOf[int]) -> tuple[np.ndarray, np.ndarray]:
        """i32[sequences] positions and slots of one more token for each of distinct sequences; all
        of them or none."""
        store, tables = self.store, self._tables
        size = store.layout.page_size
        rows = self.rows(sequence_ids)
        position = tables.length.take(rows)
        offset = position % size
        starting = (offset == 0).nonzero()[0]
        if len(starting):
            sequences = [store.sequences[sequence_ids[i]] for i in starting.tolist()]
            if store.shares:
                self.require_raw([(s, 1) for s in sequences])
                new = [store.raw.take(1, s.tenant)[0] for s in sequences]
            else:
                new = store.raw.take(len(sequences))
            indices = (position[starting] // size).tolist()
            for sequence, index, raw in zip(sequences, indices, new, strict=True):
                page = store.new_page(index, raw, sequence.tenant)
                store.adopt(sequence, page)
                tables.add_raw(sequence.row, page)
        tables.length[rows] = position + 1
        return position, tables.last_raw.take(rows) * np.int32(size) + offset

    def require_raw(self, pages: ListOf[tuple[Sequence, int]]) -> None:
        """Raises OutOfPagesError if there are not so many raw pages for the sequences together."""
        need: dict[str, int] = {}
        for sequence, count in pages:
            need[sequence.tenant] = need.get(sequence.tenant, 0) + count
        without = [tenant for tenant in need if tenant not in self.store.shares]
        for tenant, count in need.items():
            if tenant in self.store.shares:
                self.store.raw.require(count, tenant)
        if without:
            self.store.raw.require(sum(need[t] for t in without), without[0])

    def new_pages_for(self, sequence: Sequence, tokens: int) -> int:
        """Raw pages that so many more tokens take."""
        size = self.store.layout.page_size
        return -(-(sequence.length + tokens) // size) + -sequence.length // size

    def fork(self, parent: Sequence) -> Sequence:
        """A second sequence with the same tokens."""
        store = self.store
        partial = parent.length % store.layout.page_size != 0
        copies = store.raw.take(1 if partial else 0, parent.tenant)
        try:
            child = self.add(parent.tenant)
        except OutOfPagesError:
            store.raw.give_back(copies, parent.tenant)
            raise
        for page in parent.pages[: len(parent.pages) - len(copies)]:
            store.adopt(child, page)
        for raw in copies:
            last = parent.pages[-1]
            store.adopt(child, store.new_page(last.index, raw, child.tenant))
            self.copies.append((last.raw, raw))
        child.length, child.settled, child.aged = parent.length, parent.settled, parent.aged
        # From now on, raw pages that both hold receive the attention of both.
        parent.shareable = child.shareable = False
        self.counters.forks += 1
        self.refresh(child)
        return child

    def free(self, sequence: Sequence) -> None:
        """Ends a sequence."""
        for page in sequence.pages:
            self.store.disown(sequence, page)
        if sequence.row != NONE:
            self.leave_row(sequence)
        del self.store.sequences[sequence.id]

    def evict(self, sequence: Sequence, indices: ListOf[int]) -> None:
        """Drops full pages."""
        pages = {p.index: p for p in sequence.pages}
        for i in indices:
            if i not in pages or (i + 1) * self.store.layout.page_size > sequence.length:
                raise ValueError(f"indices: expected full pages of the sequence, got {i}")
        for i in set(indices):
            sequence.pages.remove(pages[i])
            self.store.disown(sequence, pages[i])
        sequence.settled = sequence.aged = 0
        sequence.shareable = False
        self.counters.evictions += len(set(indices))
        self.refresh(sequence)
