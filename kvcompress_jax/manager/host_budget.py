"""What of something in host memory has to go so that more fits."""

from collections import OrderedDict
from collections.abc import Hashable, Mapping
from typing import Generic, TypeVar

from kvcompress_jax.manager.free_list import NO_SHARES

Key = TypeVar("Key", bound=Hashable)


class HostBudget(Generic[Key]):
    """Bytes by key, within a budget; the least recently used ones go first.

    A tenant with a share of the pools has the same share of the budget, and the others share the
    rest: what one keeps makes nothing of another's go.
    """

    def __init__(self, budget_bytes: int, shares: Mapping[str, float] = NO_SHARES) -> None:
        self.budget_bytes = budget_bytes
        self.used_bytes = 0
        self._most: dict[str | None, int] = {
            tenant: int(share * budget_bytes) for tenant, share in shares.items()
        }
        self._most[None] = budget_bytes - sum(self._most.values())
        self._used: dict[str | None, int] = dict.fromkeys(self._most, 0)
        self._sizes: dict[str | None, OrderedDict[Key, int]] = {
            group: OrderedDict() for group in self._most
        }
        self._group_of: dict[Key, str | None] = {}

    def make_room(self, size: int, tenant: str = "") -> list[Key]:
        """Keys that go for a new one of this size: none when it does not fit at all."""
        group = tenant if tenant in self._most else None
        gone: list[Key] = []
        if size > self._most[group]:
            return gone
        while self._used[group] + size > self._most[group]:
            key = next(iter(self._sizes[group]))
            self.drop(key)
            gone.append(key)
        return gone

    def put(self, key: Key, size: int, tenant: str = "") -> bool:
        """Enters a new key; False when there is no room."""
        group = tenant if tenant in self._most else None
        if self._used[group] + size > self._most[group]:
            return False
        self._sizes[group][key] = size
        self._group_of[key] = group
        self._used[group] += size
        self.used_bytes += size
        return True

    def touch(self, key: Key) -> None:
        """The key was used."""
        self._sizes[self._group_of[key]].move_to_end(key)

    def drop(self, key: Key) -> None:
        """The key is no longer there."""
        group = self._group_of.pop(key)
        size = self._sizes[group].pop(key)
        self._used[group] -= size
        self.used_bytes -= size
