"""What the host knows of a page and of a sequence."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from kvcompress_jax.manager.prefix import Prefix
    from kvcompress_jax.manager.swap import Swapped

NONE = -1


@dataclasses.dataclass(slots=True, eq=False)
class Page:
    """A page of some sequences; sequences that share it hold the same object.

    Invariants: exactly one of `raw` and `sealed` is an id, except while a seal is under way
    (`pending`): then both are. `chunks` has an id for every layer at level 1, and for the floor
    layers alone at level 2. A page without owners is `kept`.
    """

    uid: int  # never used again: names the page in colder tiers
    index: int  # place in its sequences: holds tokens index * page_size and after
    tenant: str = ""  # of all its owners
    owners: set[int] = dataclasses.field(default_factory=set)  # ids of sequences that hold it
    kept: bool = False  # the prefix cache holds it too
    raw: int = NONE
    sealed: int = NONE
    sink: int = NONE  # slot of the exact first tokens; the first page of a sequence, once sealed
    level: int = 0
    chunks: tuple[int, ...] = ()  # fine chunk of each layer or NONE; empty at level 0
    pending: bool = False
    unsealable: bool = False  # holds a value that is not finite: stays at level 0
    votes: set[int] = dataclasses.field(default_factory=set)  # owners that asked for level 2


@dataclasses.dataclass(slots=True, eq=False)
class Sequence:
    """A sequence and its pages in order; only the last one can be partly filled."""

    id: int
    row: int  # its row in the manager's table, NONE while it is preempted
    lengths: np.ndarray  # of all rows; tokens, the ones that slots were just handed out for too
    tenant: str = ""
    pages: list[Page] = dataclasses.field(default_factory=list)
    settled: int = 0  # the first so many pages are sealed or never will be
    aged: int = 0  # the first so many pages are old enough for level 2
    parked: int = 0  # tokens, while it is preempted
    swapped: Swapped | None = None  # while preempted: the pages that it alone owns
    prefix: Prefix | None = None  # the longest remembered prefix that it is known to begin with
    shareable: bool = True  # whether its pages may become those of others

    @property
    def length(self) -> int:
        return self.parked if self.row == NONE else self.lengths.item(self.row)

    @length.setter
    def length(self, tokens: int) -> None:
        if self.row == NONE:
            self.parked = tokens
        else:
            self.lengths[self.row] = tokens

    def move(self, row: int) -> None:
        """To another row, or off the device (NONE)."""
        tokens = self.length
        self.row = row
        self.length = tokens
