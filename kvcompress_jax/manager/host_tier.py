"""Fine planes that left the device, for pages that were demoted and may be promoted again."""

import logging
import secrets
from collections.abc import Mapping
from typing import Protocol

import jax
import numpy as np

from kvcompress_jax.manager.free_list import NO_SHARES
from kvcompress_jax.manager.host_budget import HostBudget
from kvcompress_jax.storage.stats import DiskStats

logger = logging.getLogger(__name__)


class Below(Protocol):
    """What `HostTier` needs of a slower tier (`kvcompress_jax.storage.DiskTier`). No method waits
    for it."""

    def __contains__(self, key: object) -> bool: ...

    def put(
        self,
        key: bytes,
        planes: Mapping[str, np.ndarray],
        *,
        level: int = 0,
        tokens_hash: bytes = b"",
        durable: bool = True,
    ) -> bool: ...

    def get(self, key: bytes) -> Mapping[str, np.ndarray] | None: ...

    def drop(self, key: bytes) -> None: ...

    def settle(self) -> list[bytes]: ...

    def stats(self) -> DiskStats: ...

    def verify(self) -> None: ...


class HostTier:
    """Keeps fine planes by page uid within a budget in bytes; the oldest ones go first: to disk,
    where there is a disk tier, and else for good."""

    def __init__(
        self,
        budget_bytes: int,
        shares: Mapping[str, float] = NO_SHARES,
        disk: Below | None = None,
    ) -> None:
        """
        Args:
          budget_bytes: of host memory.
          shares: of tenants, see `HostBudget`.
          disk: what is below; nothing waits for it.
        """
        self.dropped = 0  # planes that had to go for lack of room
        self._budget: HostBudget[int] = HostBudget(budget_bytes, shares)
        self._planes: dict[int, jax.Array | np.ndarray] = {}
        self._arriving: list[int] = []
        self.disk = disk
        self._name = secrets.token_bytes(8)  # uids begin anew in the next one on the same disk
        self._below: set[int] = set()  # uids that were given to the disk

    @property
    def used_bytes(self) -> int:
        """Of host memory."""
        return self._budget.used_bytes

    @property
    def budget_bytes(self) -> int:
        """Of host memory; 0 keeps nothing."""
        return self._budget.budget_bytes

    def __len__(self) -> int:
        return len(self._planes) + len(self._below)

    def __contains__(self, uid: int) -> bool:
        """Whether the planes are in memory or on disk."""
        if uid in self._planes:
            return True
        return uid in self._below and self.disk is not None and self._key(uid) in self.disk

    def put(self, uid: int, planes: jax.Array | np.ndarray, tenant: str = "") -> None:
        """Keeps u8[layers, 2, heads, fine_rows * dim/2]. The copy of a device array to the host
        only begins here; `settle` ends it.
        When there is no room, the tenant's oldest planes go; planes that are over budget alone are
        not kept. `dropped` counts both, less what the disk took.
        """
        for old in self._budget.make_room(planes.nbytes, tenant):
            self._sink(old)
        if not self._budget.put(uid, planes.nbytes, tenant):
            self.dropped += 1
            return
        if isinstance(planes, jax.Array):
            planes.copy_to_host_async()
            self._arriving.append(uid)
        self._planes[uid] = planes

    def ready(self, uid: int) -> bool:
        """Whether `take` has the planes of a page now; if they are on disk, begins to read them,
        and `settle` names the page when they arrived."""
        if uid in self._planes:
            return True
        return uid in self and self.disk is not None and self.disk.get(self._key(uid)) is not None

    def take(self, uid: int) -> np.ndarray:
        """Removes and returns the planes of a page; KeyError if they are not `ready`."""
        if uid in self._planes:
            self._budget.drop(uid)
            return np.asarray(self._planes.pop(uid))
        found = self.disk.get(self._key(uid)) if uid in self and self.disk is not None else None
        if found is None:
            raise KeyError(uid)
        planes = found["fine"]
        self.drop(uid)
        return planes

    def drop(self, uid: int) -> None:
        """Forgets the planes of a page, if they are here."""
        if self._planes.pop(uid, None) is not None:
            self._budget.drop(uid)
        if uid in self._below and self.disk is not None:
            self._below.discard(uid)
            self.disk.drop(self._key(uid))

    def settle(self) -> list[int]:
        """Ends the copies that `put` began: what they took on the device is freed.

        Returns:
          Pages whose reads from disk ended, well or not.
        """
        for uid in self._arriving:
            if uid in self._planes:
                try:
                    self._planes[uid] = np.asarray(self._planes[uid])
                except MemoryError as e:
                    logger.warning("fine planes of a page are lost: no host memory: %s", e)
                    self.drop(uid)
                    self.dropped += 1
        self._arriving.clear()
        if self.disk is None:
            return []
        ours = [k for k in self.disk.settle() if k.startswith(self._name)]
        return [int.from_bytes(key[len(self._name) :], "little") for key in ours]

    def measured_bytes(self) -> int:
        """Of the arrays that are in memory; to be `used_bytes`."""
        return sum(x.nbytes for x in self._planes.values())

    def _sink(self, uid: int) -> None:
        planes = np.asarray(self._planes.pop(uid))
        # Of no use after this process.
        if self.disk is not None and self.disk.put(
            self._key(uid), {"fine": planes}, level=2, durable=False
        ):
            self._below.add(uid)
        else:
            self.dropped += 1

    def _key(self, uid: int) -> bytes:
        return self._name + uid.to_bytes(8, "little")
