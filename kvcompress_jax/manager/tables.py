"""The page tables of all sequences, kept up to date entry by entry."""

import numpy as np

from kvcompress_jax.manager.page import NONE, Page, Sequence
from kvcompress_jax.paged.table import PageTable

NARROWEST = 4  # columns of the smallest table
_SEALED, _RAW = 0, 1


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
        self._changes = [0, 0]  # of the tables of each kind, so far
        self._cut: list[tuple[np.ndarray, object, np.ndarray, np.ndarray] | None] = [None, None]

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
        count = int(self._count[_RAW, row])
        self._widen(_RAW, count + 1)
        self._ids[_RAW][row, count] = self.last_raw[row] = page.raw
        self._index[_RAW][row, count] = page.index
        self._count[_RAW, row] = count + 1
        self._changes[_RAW] += 1

    def seal(self, row: int, page: Page) -> None:
        """A page of the sequence moves from the raw to the sealed ones."""
        index = self._index[_RAW][row]
        at, count = index.tolist().index(page.index), int(self._count[_RAW, row])
        for kept in (self._ids[_RAW][row], index):
            kept[at : count - 1] = kept[at + 1 : count]
        self._count[_RAW, row] = count - 1
        count = int(self._count[_SEALED, row])
        self._widen(_SEALED, count + 1)
        self._ids[_SEALED][row, count] = page.sealed
        self._index[_SEALED][row, count] = page.index
        self._count[_SEALED, row] = count + 1
        if page.index == 0:
            self._sink[row] = page.sink
        self._changed()

    def _changed(self) -> None:
        self._changes[_SEALED] += 1
        self._changes[_RAW] += 1

    def table(self, rows: np.ndarray, padded_rows: int, sealed_columns: int | None) -> PageTable:
        """The table of some rows; see `KVCacheManager.table`. Its arrays never change: what did not
        change since the last call with the same array of rows is handed out again."""

        def pad(x: np.ndarray) -> np.ndarray:
            if len(rows) == padded_rows:
                return x.take(rows, axis=0)
            out = np.zeros((padded_rows, *x.shape[1:]), np.int32)
            out[: len(rows)] = x[rows]
            return out

        small = np.zeros((4, padded_rows), np.int32)
        small[3, len(rows) :] = NONE
        self._small.take(rows, axis=1, out=small[:, : len(rows)])
        ids, index = [], []
        for kind in range(2):
            width = _power_of_two(int(small[kind].max(initial=0)))
            if kind == _SEALED and sealed_columns is not None:
                width = sealed_columns
            self._widen(kind, width)
            cut = self._cut[kind]
            key = (self._changes[kind], width, padded_rows)
            if cut is None or cut[0] is not rows or cut[1] != key:
                columns = (self._ids[kind], self._index[kind])
                if width < columns[0].shape[1]:
                    columns = (columns[0][:, :width], columns[1][:, :width])
                cut = self._cut[kind] = (rows, key, pad(columns[0]), pad(columns[1]))
            ids.append(cut[2])
            index.append(cut[3])
        return PageTable(
            sealed=ids[_SEALED],
            sealed_index=index[_SEALED],
            sealed_count=small[_SEALED],
            raw=ids[_RAW],
            raw_index=index[_RAW],
            raw_count=small[_RAW],
            sink=small[3],
            length=small[2],
        )

    def _widen(self, kind: int, columns: int) -> None:
        have = self._ids[kind].shape[1]
        if columns > have:
            more = ((0, 0), (0, _power_of_two(columns) - have))
            self._ids[kind] = np.pad(self._ids[kind], more)
            self._index[kind] = np.pad(self._index[kind], more)


def _power_of_two(n: int) -> int:
    return max(NARROWEST, 1 << (n - 1).bit_length())
