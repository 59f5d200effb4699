"""Sequences begin, grow, fork, lose pages and end."""

from collections.abc import Sequence as ListOf

import numpy as np

from kvcompress_jax.manager.counters import Counters
from kvcompress_jax.manager.free_list import OutOfPagesError
from kvcompress_jax.manager.page import NONE, Sequence
from kvcompress_jax.manager.page_store import PageStore
from kvcompress_jax.manager.tables import TableRows


class Lives:
    """What happens to sequences; the public methods of `KVCacheManager` say what each promises."""

    def __init__(self, store: PageStore, tables: TableRows, counters: Counters) -> None:
        self.store = store
        self.counters = counters
        self.copies: list[tuple[int, int]] = []  # raw pages that a plan must copy for forks
        self._tables = tables
        self._next_id = 0

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

    def add(self) -> Sequence:
        """A new, empty sequence."""
        (row,) = self.store.rows.take()
        sequence = Sequence(id=self._next_id, row=row)
        self._next_id += 1
        self.store.sequences[sequence.id] = sequence
        self._tables.refresh(sequence)
        return sequence

    def append_slots(self, sequence: Sequence, tokens: int) -> np.ndarray:
        """i32[tokens], room for the next tokens."""
        size = self.store.layout.page_size
        position = np.arange(sequence.length, sequence.length + tokens)
        have = -(-sequence.length // size)
        new = self.store.raw.take(-(-(sequence.length + tokens) // size) - have)
        for index, raw in enumerate(new, start=have):
            self.store.adopt(sequence, self.store.new_page(index, raw))
        sequence.length += tokens
        if new:
            self._tables.refresh(sequence)
        else:
            self._tables.lengthen(sequence)
        first = int(position[0]) // size
        raw_of = np.array([p.raw for p in sequence.pages[-len(new) - 1 :] if p.index >= first])
        return (raw_of[position // size - first] * size + position % size).astype(np.int32)

    def fork(self, parent: Sequence) -> Sequence:
        """A second sequence with the same tokens."""
        store = self.store
        partial = parent.length % store.layout.page_size != 0
        copies = store.raw.take(1 if partial else 0)
        try:
            child = self.add()
        except OutOfPagesError:
            store.raw.give_back(copies)
            raise
        for page in parent.pages[: len(parent.pages) - len(copies)]:
            store.adopt(child, page)
        for raw in copies:
            last = parent.pages[-1]
            store.adopt(child, store.new_page(last.index, raw))
            self.copies.append((last.raw, raw))
        child.length, child.settled = parent.length, parent.settled
        self.counters.forks += 1
        self._tables.refresh(child)
        return child

    def free(self, sequence: Sequence) -> None:
        """Ends a sequence."""
        for page in sequence.pages:
            self.store.disown(sequence, page)
        if sequence.row != NONE:
            self._tables.clear(sequence.row)
            self.store.rows.give_back([sequence.row])
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
        sequence.settled = 0
        self.counters.evictions += len(set(indices))
        self._tables.refresh(sequence)
