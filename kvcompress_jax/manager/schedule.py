"""At which length something becomes due for each sequence."""

import numpy as np

from kvcompress_jax.config import CompressionConfig
from kvcompress_jax.manager.page import NONE, Page, Sequence
from kvcompress_jax.manager.page_store import PageStore

_NEVER = np.iinfo(np.int32).max


class Schedule:
    """Two alarms a row: a page leaves the window, a page is old enough for level 2. A step looks
    at the sequences whose alarm rings, and at no others.

    The first rings a token ahead of time, where a page is full by then: its seal is done when the
    page has left the window, and nobody waits for it (`kvcompress_jax.manager.seals`).
    """

    def __init__(self, store: PageStore, config: CompressionConfig, lengths: np.ndarray) -> None:
        self._store = store
        self._config = config
        self._lengths = lengths
        self._seal_after = max(0, config.window_tokens - 1)
        self._seal_at = np.full(len(lengths), _NEVER, np.int32)
        self._age_at = np.full(len(lengths), _NEVER, np.int32)

    def clear(self, row: int) -> None:
        """Nobody has the row."""
        self._seal_at[row] = self._age_at[row] = _NEVER

    def reset(self, sequence: Sequence) -> None:
        """The pages of a sequence changed."""
        if self._config.compresses:
            end = self._end(sequence, sequence.settled, sequence.length)
            self._seal_at[sequence.row] = end + self._seal_after
        if self._config.demote_after_tokens is not None:
            after = self._config.demote_after_tokens
            end = self._end(sequence, sequence.aged, sequence.length)
            self._age_at[sequence.row] = end + after

    def leaving(self) -> list[Page]:
        """Raw pages to seal now, each once, oldest sequence first: in all their owners they have
        left the window, or will with the next token."""
        due: dict[int, Page] = {}
        after, size = self._seal_after, self._store.layout.page_size
        for sequence in self._ringing(self._seal_at):
            pages, first, length = sequence.pages, sequence.settled, sequence.length
            count = len(pages)
            while first < count and (pages[first].sealed != NONE or pages[first].unsealable):
                first += 1
            sequence.settled = first
            for at in range(first, count):
                page = pages[at]
                if length - (page.index + 1) * size < after:
                    break
                if page.sealed != NONE or page.unsealable:
                    continue
                if len(page.owners) == 1 or self._store.age(page) >= after:
                    due[page.uid] = page
            # A page that stays raw, for lack of room or for another owner, rings again.
            self._seal_at[sequence.row] = self._end(sequence, first, length) + after
        return list(due.values())

    def ageing(self) -> bool:
        """Marks pages that became old enough for level 2 in some owner; whether there are any."""
        found = False
        for sequence in self._ringing(self._age_at):
            pages, size = sequence.pages, self._store.layout.page_size
            after = self._config.demote_after_tokens or 0
            while sequence.aged < len(pages):
                page = pages[sequence.aged]
                if sequence.length - (page.index + 1) * size < after or page.pending:
                    break
                if page.sealed != NONE:
                    self._store.old[page.sealed] = found = True
                elif not page.unsealable:
                    break  # it waits for room at level 0
                sequence.aged += 1
            self.reset(sequence)
        return found

    def _ringing(self, alarm: np.ndarray) -> list[Sequence]:
        rows = (self._lengths >= alarm).nonzero()[0].tolist()
        found = [s for row in rows if (s := self._store.by_row[row]) is not None]
        found.sort(key=lambda s: s.id)
        return found

    def _end(self, sequence: Sequence, first: int, length: int) -> int:
        """Tokens up to the end of page number `first` of the sequence, which may not exist yet."""
        size = self._store.layout.page_size
        if first < len(sequence.pages):
            return (sequence.pages[first].index + 1) * size
        return (-(-length // size) + 1) * size
