"""The page tables of all sequences, kept up to date entry by entry."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from kvcompress_jax.manager.page import NONE, Page, Sequence
from kvcompress_jax.paged.table import PageTable

NARROWEST = 4  # columns of the smallest table
_SEALED, _RAW = 0, 1


class _Cut(NamedTuple):
    """What was handed out last."""

    rows: np.ndarray
    key: tuple[int, int, int]
    ids: np.ndarray
    indices: np.ndarray


class TableRows:
    """NumPy rows that `table` cuts a batch's table from; only what changed is rewritten.

    Attributes:
      length: i32[rows] tokens.
      last_raw: i32[rows], raw page of the last token.
    """

    def __init__(self, max_sequences: int) -> None:
        self._ids = [np.zeros((max_sequences, NARROWEST), np.int32) for _ in range(2)]
        self._index = [np.zeros((max_sequences, NARROWEST), np.int32) for _ in range(2)]
        self._small = np.zeros((4, max_sequences), np.int32)
        self._small[3] = NONE
        # Views: one copy takes all of them.
        self._count, self.length, self._sink = self._small[:2], self._small[2], self._small[3]
        self.last_raw = np.zeros(max_sequences, np.int32)
        self._changes = [0, 0]  # of the tables of each kind, so far, that a cut does not follow
        self._cut: list[_Cut | None] = [None, None]
        self._place = np.full(max_sequences, NONE)  # of each row in the cut of sealed pages

    def clear(self, row: int) -> None:
        """Makes a row that of an empty sequence."""
        self._count[:, row] = 0
        self._sink[row] = NONE
        self.length[row] = 0
        self._changed()

    def refresh(self, sequence: Sequence) -> None:
        """Rewrites the row of a sequence whose pages changed."""
        row = sequence.row
        raw = [p for p in sequence.pages if p.sealed == NONE or p.pending]
        sealed = [p for p in sequence.pages if p.sealed != NONE and not p.pending]
        for kind, pages in enumerate((sealed, raw)):
            self._widen(kind, len(pages))
            self._count[kind, row] = len(pages)
            self._ids[kind][row, : len(pages)] = [p.raw if kind else p.sealed for p in pages]
            self._index[kind][row, : len(pages)] = [p.index for p in pages]
        self._sink[row] = sealed[0].sink if sealed and sealed[0].index == 0 else NONE
        if raw:
            self.last_raw[row] = raw[-1].raw
        self._changed()

    def add_raw(self, row: int, page: Page) -> None:
        """The sequence has a new page, its last one."""
        count = self._count.item(_RAW, row)
        self._widen(_RAW, count + 1)
        self._ids[_RAW][row, count] = self.last_raw[row] = page.raw
        self._index[_RAW][row, count] = page.index
        self._count[_RAW, row] = count + 1
        self._changes[_RAW] += 1

    def seal(self, row: int, page: Page) -> None:
        """A page of the sequence moves from the raw to the sealed ones."""
        index = self._index[_RAW][row]
        at, count = index.tolist().index(page.index), self._count.item(_RAW, row)
        for kept in (self._ids[_RAW][row], index):
            kept[at : count - 1] = kept[at + 1 : count]
        self._count[_RAW, row] = count - 1
        self._changes[_RAW] += 1
        count = self._count.item(_SEALED, row)
        self._widen(_SEALED, count + 1)
        self._ids[_SEALED][row, count] = page.sealed
        self._index[_SEALED][row, count] = page.index
        self._count[_SEALED, row] = count + 1
        cut, place = self._cut[_SEALED], self._place.item(row)
        if cut is not None and place != NONE and count < cut.ids.shape[1]:
            # Past the entries that count in tables that were handed out.
            cut.ids[place, count] = page.sealed
            cut.indices[place, count] = page.index
        if page.index == 0:
            self._sink[row] = page.sink

    def _changed(self) -> None:
        self._changes[_SEALED] += 1
        self._changes[_RAW] += 1

    def table(self, rows: np.ndarray, padded_rows: int, sealed_columns: int | None) -> PageTable:
        """The table of some distinct rows; see `KVCacheManager.table`. The entries that count never
        change in it. What did not change since the last call with the same array of rows is handed
        out again, and a page that is sealed adds an entry to it, past those that count."""
        if len(rows) == padded_rows:
            small = self._small.take(rows, axis=1)
        else:
            small = np.zeros((4, padded_rows), np.int32)
            small[3, len(rows) :] = NONE
            small[:, : len(rows)] = self._small[:, rows]
        widths = [_power_of_two(n) for n in small[:2].max(axis=1, initial=0).tolist()]
        if sealed_columns is not None:
            widths[_SEALED] = sealed_columns
        sealed, raw = (self._cut_of(kind, rows, padded_rows, widths[kind]) for kind in range(2))
        return PageTable(
            sealed=sealed.ids,
            sealed_index=sealed.indices,
            sealed_count=small[_SEALED],
            raw=raw.ids,
            raw_index=raw.indices,
            raw_count=small[_RAW],
            sink=small[3],
            length=small[2],
        )

    def _cut_of(self, kind: int, rows: np.ndarray, padded_rows: int, width: int) -> _Cut:
        cut, key = self._cut[kind], (self._changes[kind], width, padded_rows)
        if cut is not None and cut.rows is rows and cut.key == key:
            return cut
        self._widen(kind, width)

        def pad(x: np.ndarray) -> np.ndarray:
            x = x if width == x.shape[1] else x[:, :width]
            if len(rows) == padded_rows:
                return x.take(rows, axis=0)
            out = np.zeros((padded_rows, width), np.int32)
            out[: len(rows)] = x[rows]
            return out

        cut = _Cut(rows, key, pad(self._ids[kind]), pad(self._index[kind]))
        if len(rows) > 1:  # a prompt's table, cut for itself, leaves that of the batch alone
            self._cut[kind] = cut
            if kind == _SEALED:
                self._place.fill(NONE)
                self._place[rows] = np.arange(len(rows))
        return cut

    def _widen(self, kind: int, columns: int) -> None:
        have = self._ids[kind].shape[1]
        if columns > have:
            more = ((0, 0), (0, _power_of_two(columns) - have))
            self._ids[kind] = np.pad(self._ids[kind], more)
            self._index[kind] = np.pad(self._index[kind], more)


def _power_of_two(n: int) -> int:
    return max(NARROWEST, 1 << (n - 1).bit_length())
