"""Which offloaded pages go first: an eviction policy for vLLM's slot for one."""

import heapq
from collections.abc import Iterable, Sequence

from vllm.v1.kv_offload.base import OffloadKey, ReqContext
from vllm.v1.kv_offload.cpu.policies.base import CachePolicy, ChunkStatus, order_request_keys


class ImportancePolicy(CachePolicy):
    """Evicts the pages whose tokens got least attention, aged by use.

    A page's worth is the clock of its last use plus the attention that its tokens received, in
    units of that of a typical page; the clock goes on with each eviction to the worth of what was
    evicted, so that nothing stays for what it once was (GreedyDual: Young, 1994). A page is no use
    without those before it, so that none is worth less than the pages of its request behind it.
    """

    def __init__(self, cache_capacity: int) -> None:
        super().__init__(cache_capacity)
        self.chunks: dict[OffloadKey, ChunkStatus] = {}
        self._clock = 0.0
        self._worth: dict[OffloadKey, float] = {}
        self._importance: dict[OffloadKey, float] = {}
        self._total = 0.0

    def weigh(self, key: OffloadKey, attention: float) -> None:
        """Says how much attention a page's tokens received; before that it counts as typical."""
        if key not in self.chunks:
            return
        self._total += attention - self._importance.get(key, 0.0)
        self._importance[key] = attention
        self.touch([key], None)

    def get(self, key: OffloadKey) -> ChunkStatus | None:
        """See `CachePolicy`."""
        return self.chunks.get(key)

    def insert(self, key: OffloadKey, chunk: ChunkStatus) -> None:
        """See `CachePolicy`."""
        self.chunks[key] = chunk
        self.touch([key], None)

    def remove(self, key: OffloadKey) -> None:
        """See `CachePolicy`."""
        del self.chunks[key]
        self._worth.pop(key, None)
        self._total -= self._importance.pop(key, 0.0)

    def touch(self, keys: Iterable[OffloadKey], req_context: ReqContext | None) -> None:
        """See `CachePolicy`."""
        typical = self._total / len(self._importance) if self._importance else 0.0
        for key in keys:
            if key in self.chunks:
                attention = self._importance.get(key, typical)
                self._worth[key] = self._clock + (attention / typical if typical > 0 else 1.0)

    def on_request_finished(
        self,
        key_groups: Sequence[Sequence[OffloadKey]],
        insertion_only_keys: set[OffloadKey],
        reused_keys: set[OffloadKey],
        req_context: ReqContext,
    ) -> None:
        """See `CachePolicy`."""
        keys = [k for k in order_request_keys(key_groups, req_context) if k in self.chunks]
        self.touch(keys, req_context)
        behind = 0.0
        for key in reversed(keys):
            behind = self._worth[key] = max(self._worth[key], behind)

    def evict(
        self, n: int, protected: set[OffloadKey]
    ) -> list[tuple[OffloadKey, ChunkStatus]] | None:
        """See `CachePolicy`. Of pages of equal worth the newest goes first: the end of a prefix."""
        free = [
            (worth, -i, key)
            for i, (key, worth) in enumerate(self._worth.items())
            if self.chunks[key].ref_cnt == 0 and key not in protected
        ]
        if len(free) < n:
            return None
        evicted = []
        for worth, _, key in heapq.nsmallest(n, free):
            self._clock = max(self._clock, worth)
            evicted.append((key, self.chunks[key]))
            self.remove(key)
        return evicted

    def clear(self) -> None:
        """See `CachePolicy`."""
        self.__init__(self.cache_capacity)  # type: ignore[misc]
