"""The page tables of all sequences, kept up to date row by row."""

from collections.abc import Sequence as ListOf

import numpy as np

from kvcompress_jax.manager.page import NONE, Sequence
from kvcompress_jax.paged.table import PageTable

NARROWEST = 4  # columns of the smallest table


class TableRows:
    """NumPy rows that `table` cuts a batch's table from; only changed sequences are rewritten."""

    def __init__(self, max_sequences: int) -> None:
        self._ids = [np.zeros((max_sequences, NARROWEST), np.int32) for _ in range(2)]
        self._index = [np.zeros((max_sequences, NARROWEST), np.int32) for _ in range(2)]
        self._count = np.zeros((2, max_sequences), np.int32)
        self._sink = np.full(max_sequences, NONE, np.int32)
        self._length = np.zeros(max_sequences, np.int32)

    def clear(self, row: int) -> None:
        """Makes a row that of an empty sequence."""
        self._count[:, row] = 0
        self._sink[row] = NONE
        self._length[row] = 0

    def refresh(self, sequence: Sequence) -> None:
        """Rewrites the row of a sequence whose pages changed."""
        row = sequence.row
        self.clear(row)
        self._length[row] = sequence.length
        raw = [p for p in sequence.pages if p.sealed == NONE or p.pending]
        sealed = [p for p in sequence.pages if p.sealed != NONE and not p.pending]
        for kind, pages in enumerate((sealed, raw)):
            self._widen(kind, len(pages))
            self._count[kind, row] = len(pages)
            self._ids[kind][row, : len(pages)] = [p.raw if kind else p.sealed for p in pages]
            self._index[kind][row, : len(pages)] = [p.index for p in pages]
        if sealed and sealed[0].index == 0:
            self._sink[row] = sealed[0].sink

    def lengthen(self, sequence: Sequence) -> None:
        """The sequence has more tokens, but the same pages."""
        self._length[sequence.row] = sequence.length

    def table(self, rows: ListOf[int], padded_rows: int, sealed_columns: int | None) -> PageTable:
        """The table of some rows, copied; see `KVCacheManager.table`."""
        pick = np.array(rows, np.int64)

        def pad(x: np.ndarray) -> np.ndarray:
            out = np.zeros((padded_rows, *x.shape[1:]), np.int32)
            out[: len(rows)] = x
            return out

        count = self._count[:, pick]
        widths = [_power_of_two(int(c.max(initial=0))) for c in count]
        if sealed_columns is not None:
            widths[0] = sealed_columns
        ids, index = (
            [pad(columns[kind][pick, : widths[kind]]) for kind in range(2)]
            for columns in (self._ids, self._index)
        )
        sink = np.full(padded_rows, NONE, np.int32)
        sink[: len(rows)] = self._sink[pick]
        return PageTable(
            sealed=ids[0],
            sealed_index=index[0],
            sealed_count=pad(count[0]),
            raw=ids[1],
            raw_index=index[1],
            raw_count=pad(count[1]),
            sink=sink,
            length=pad(self._length[pick]),
        )

    def _widen(self, kind: int, columns: int) -> None:
        have = self._ids[kind].shape[1]
        if columns > have:
            more = ((0, 0), (0, _power_of_two(columns) - have))
            self._ids[kind] = np.pad(self._ids[kind], more)
            self._index[kind] = np.pad(self._index[kind], more)


def _power_of_two(n: int) -> int:
    return max(NARROWEST, 1 << (n - 1).bit_length())
