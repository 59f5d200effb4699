"""Fine planes in host memory, for pages that were demoted and may be promoted again."""

import collections

import jax
import numpy as np


class HostTier:
    """Keeps fine planes by page uid within a budget in bytes; the oldest ones go first."""

    def __init__(self, budget_bytes: int) -> None:
        self.budget_bytes = budget_bytes
        self.used_bytes = 0
        self.dropped = 0  # planes that had to go for lack of room
        self._planes: collections.OrderedDict[int, jax.Array | np.ndarray] = (
            collections.OrderedDict()
        )
        self._arriving: list[int] = []

    def __len__(self) -> int:
        return len(self._planes)

    def __contains__(self, uid: object) -> bool:
        return uid in self._planes

    def put(self, uid: int, planes: jax.Array | np.ndarray) -> None:
        """Keeps u8[layers, 2, heads, fine_rows, dim/2]. The copy of a device array to the host only
        begins here; `settle` ends it.
        When there is no room, the oldest planes go; planes that are over budget alone are not
        kept. `dropped` counts both.
        """
        if planes.nbytes > self.budget_bytes:
            self.dropped += 1
            return
        while self.used_bytes + planes.nbytes > self.budget_bytes:
            _, old = self._planes.popitem(last=False)
            self.used_bytes -= old.nbytes
            self.dropped += 1
        if isinstance(planes, jax.Array):
            planes.copy_to_host_async()
            self._arriving.append(uid)
        self._planes[uid] = planes
        self.used_bytes += planes.nbytes

    def take(self, uid: int) -> np.ndarray:
        """Removes and returns the planes of a page; KeyError if they are not here."""
        planes = self._planes.pop(uid)
        self.used_bytes -= planes.nbytes
        return np.asarray(planes)

    def drop(self, uid: int) -> None:
        """Forgets the planes of a page, if they are here."""
        if uid in self._planes:
            self.used_bytes -= self._planes.pop(uid).nbytes

    def settle(self) -> None:
        """Ends the copies that `put` began: what they took on the device is freed."""
        for uid in self._arriving:
            if uid in self._planes:
                self._planes[uid] = np.asarray(self._planes[uid])
        self._arriving.clear()
