"""Seals that were started: from when the device is told until the tables say so."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, NamedTuple

import jax
import numpy as np

from kvcompress_jax.manager.page import NONE, Page, Sequence

if TYPE_CHECKING:
    from kvcompress_jax.manager.counters import Counters
    from kvcompress_jax.manager.device import Device
    from kvcompress_jax.manager.page_store import PageStore
    from kvcompress_jax.manager.tables import TableRows
    from kvcompress_jax.paged.cache import PagedCache

logger = logging.getLogger("kvcompress_jax.manager")


class Flags:
    """Which pages have a code, once the device knows; read once for all of a plan."""

    def __init__(self, sealed: jax.Array | np.ndarray) -> None:
        """
        Args:
          sealed: bool[entries].
        """
        self._sealed = sealed
        self._known: list[bool] | None = None

    def wait(self, entry: int) -> bool:
        """Whether this one has; waits for the device if it does not know yet."""
        if self._known is None:
            self._known = np.asarray(self._sealed).tolist()
        return self._known[entry]


class Outcome(NamedTuple):
    """Where to read how a seal ended."""

    flags: Flags
    entry: int


class Seals:
    """A page becomes a sealed one when it leaves the window, and not before: who attends to it in
    which form is a matter of its sequences' lengths alone. Its seal may have been started a token
    ahead of that (`Schedule`), and then nobody waits for the device to learn how it ended."""

    def __init__(
        self,
        store: PageStore,
        tables: TableRows,
        counters: Counters,
        device: Device,
        *,
        window_tokens: int,
    ) -> None:
        self._store = store
        self._tables = tables
        self._counters = counters
        self._device = device
        self._window_tokens = window_tokens

    def require_told(self, who: str) -> None:
        """
        Raises:
          RuntimeError: there are seals that were planned and of which nobody told how they end.
        """
        if self._untold():
            raise RuntimeError(f"{who}: expected the last plan to be confirmed by commit()")

    def started(self, sealed: jax.Array | np.ndarray | None) -> None:
        """The last plan is on the device.

        Args:
          sealed: bool[entries], which of its seals have a code, once that is known; None if it has
            no seals.
        """
        if sealed is None:
            return
        flags = Flags(sealed)
        for i, page in enumerate(self._untold()):
            self._store.pending[page] = Outcome(flags, i)

    def commit(self, cache: PagedCache) -> None:
        """`settle`, after a plan that somebody else applied, too; waits for the device then."""
        if untold := self._untold():
            flags = Flags(self._device.sealed(cache))
            for page in untold:
                self._store.pending[page] = Outcome(flags, page.sealed)
        self.settle(cache)

    def settle(self, cache: PagedCache) -> None:
        """Confirms the pages that have left the window. A page that could not be sealed stays at
        level 0 and is counted."""
        store = self._store
        due = [
            (page, outcome)
            for page, outcome in store.pending.items()
            if outcome is not None and store.age(page) >= self._window_tokens
        ]
        for page, outcome in due:
            if outcome.flags.wait(outcome.entry):
                store.confirm(page)
                self._counters.seals += 1
                for owner in page.owners:
                    if (row := store.sequences[owner].row) != NONE:
                        self._tables.seal(row, page)
            else:
                store.return_code(page)
                page.unsealable = True
                self._counters.rejected += 1
                why = self._device.why_rejected(cache, page.raw, page.index)
                logger.warning("page stays at level 0: %s", why)

    def cancel(self, sequence: Sequence) -> None:
        """A sequence leaves the device: pages that it alone owns, and that are not due, are as
        before, and will be sealed when it is back."""
        for page in sequence.pages:
            if page.pending and page.owners == {sequence.id}:
                self._store.return_code(page)
                sequence.settled = 0

    def _untold(self) -> list[Page]:
        return [page for page, outcome in self._store.pending.items() if outcome is None]
