"""Ids of the pages of one pool, and whose they are."""

import types
from collections.abc import Iterable, Mapping

NO_SHARES: Mapping[str, float] = types.MappingProxyType({})


class OutOfPagesError(RuntimeError):
    """A pool has no room; nothing was changed. Free, preempt or wait, then try again.

    Attributes:
      tenant: for whom there is no room.
    """

    def __init__(self, message: str, tenant: str = "") -> None:
        super().__init__(message)
        self.tenant = tenant


class FreeList:
    """Hands out ids 0..capacity-1, each to one owner at a time, the last returned one first.

    A tenant with a share can have that part of the pool at any time, and no more; tenants without
    one share what nobody has a share of.
    """

    def __init__(self, name: str, capacity: int, shares: Mapping[str, float] = NO_SHARES) -> None:
        self.name = name
        self.capacity = capacity
        self._free = list(range(capacity - 1, -1, -1))
        self._used: set[int] = set()
        self._most = {tenant: int(share * capacity) for tenant, share in shares.items()}
        self._has = dict.fromkeys(self._most, 0)

    @property
    def free(self) -> int:
        return len(self._free)

    @property
    def used(self) -> int:
        return self.capacity - len(self._free)

    def is_used(self, i: int) -> bool:
        return i in self._used

    def used_by(self, tenant: str) -> int:
        """Ids of a tenant that has a share."""
        return self._has[tenant]

    def most(self, tenant: str) -> int:
        """Ids that a tenant can have at most."""
        return self._most.get(tenant, self.capacity - sum(self._most.values()))

    def room(self, tenant: str = "") -> int:
        """Ids that `take` would give this tenant."""
        if not self._most:
            return len(self._free)
        if tenant in self._most:
            return self._most[tenant] - self._has[tenant]
        kept = sum(self._most.values()) - sum(self._has.values())
        return len(self._free) - kept

    def require(self, count: int, tenant: str = "") -> None:
        """Raises OutOfPagesError if `take` would."""
        if count > (room := self.room(tenant)):
            whose = f" for tenant {tenant!r}" if self._most else ""
            raise OutOfPagesError(
                f"{self.name}: expected {count} free{whose}, got {room} of {self.most(tenant)}",
                tenant,
            )

    def take(self, count: int = 1, tenant: str = "") -> list[int]:
        """Takes `count` ids, or none of them.

        Raises:
          OutOfPagesError: fewer are free for this tenant.
        """
        if self._most or count > len(self._free):
            self.require(count, tenant)
        if count == 0:
            return []
        ids = self._free[: -count - 1 : -1]
        del self._free[-count:]
        self._used.update(ids)
        if tenant in self._has:
            self._has[tenant] += count
        return ids

    def give_back(self, ids: Iterable[int], tenant: str = "") -> None:
        """Returns ids of a tenant.

        Raises:
          ValueError: an id is not in use, or there twice; none was returned.
        """
        back = list(ids)
        if not self._used.issuperset(back) or len(set(back)) < len(back):
            wrong = next((i for i in back if i not in self._used), back)
            raise ValueError(f"{self.name}: expected an id in use, got {wrong}")
        self._used.difference_update(back)
        self._free += back
        if tenant in self._has:
            self._has[tenant] -= len(back)
