"""What the host knows of a page and of a sequence."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from kvcompress_jax.manager.swap import Swapped

NONE = -1


@dataclasses.dataclass(slots=True, eq=False)
class Page:
    """A page of some sequences; sequences that share it hold the same object.

    Invariants: exactly one of `raw` and `sealed` is an id, except while a seal is under way
    (`pending`): then both are. `chunks` has an id for every layer at level 1, and for the floor
    layers alone at level 2.
    """

    uid: int  # never used again: names the page in colder tiers
    index: int  # place in its sequences: holds tokens index * page_size and after
    owners: set[int] = dataclasses.field(default_factory=set)  # ids of sequences that hold it
    raw: int = NONE
    sealed: int = NONE
    sink: int = NONE  # slot of the exact first tokens; the first page of a sequence, once sealed
    level: int = 0
    chunks: tuple[int, ...] = ()  # fine chunk of each layer or NONE; empty at level 0
    pending: bool = False
    unsealable: bool = False  # holds a value that is not finite: stays at level 0
    heat: float = 0.0  # decayed attention mass, as last reported by the device


@dataclasses.dataclass(slots=True, eq=False)
class Sequence:
    """A sequence and its pages in order; only the last one can be partly filled."""

    id: int
    row: int  # its row in the manager's table, NONE while it is preempted
    pages: list[Page] = dataclasses.field(default_factory=list)
    length: int = 0  # tokens, including the ones that slots were just handed out for
    settled: int = 0  # the first so many pages are sealed or never will be
    swapped: Swapped | None = None  # while preempted: the pages that it alone owns
