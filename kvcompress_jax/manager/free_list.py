"""Ids of the pages of one pool."""

from collections.abc import Iterable


class OutOfPagesError(RuntimeError):
    """A pool has no room; nothing was changed. Free, preempt or wait, then try again."""


class FreeList:
    """Hands out ids 0..capacity-1, each to one owner at a time, the last returned one first."""

    def __init__(self, name: str, capacity: int) -> None:
        self.name = name
        self.capacity = capacity
        self._free = list(range(capacity - 1, -1, -1))
        self._used = bytearray(capacity)

    @property
    def free(self) -> int:
        return len(self._free)

    @property
    def used(self) -> int:
        return self.capacity - len(self._free)

    def is_used(self, i: int) -> bool:
        return bool(self._used[i])

    def take(self, count: int = 1) -> list[int]:
        """Takes `count` ids, or none of them.

        Raises:
          OutOfPagesError: fewer are free.
        """
        if count > len(self._free):
            raise OutOfPagesError(
                f"{self.name}: expected {count} free, got {len(self._free)} of {self.capacity}"
            )
        if count == 0:
            return []
        ids = self._free[: -count - 1 : -1]
        del self._free[-count:]
        for i in ids:
            self._used[i] = 1
        return ids

    def give_back(self, ids: Iterable[int]) -> None:
        """Returns ids.

        Raises:
          ValueError: an id is not in use; ids before it were returned.
        """
        for i in ids:
            if not 0 <= i < self.capacity or not self._used[i]:
                raise ValueError(f"{self.name}: expected an id in use, got {i}")
            self._used[i] = 0
            self._free.append(i)
