"""Sealed pages that requests with the same beginning share, and that stay when nobody uses them.

What a page's code is depends on more than the page's tokens. Its keys and values come from layers
that attended to earlier pages as they were then, and the order of its tokens from the attention
that they received until it was sealed. Both are the same for two sequences that were fed the same
tokens in the same steps. So what is remembered is a *prefix*: the state of a sequence that was fed
so many tokens from its beginning in steps of these lengths. A sequence that continues from there
has what it would have had without, bit for bit: the codes, the order inside each page (decided by
tokens that all owners have in common), and the pages of the window, which are raw and come back
from host memory with the attention that they had received.
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Sequence as ListOf
from typing import TYPE_CHECKING

import jax
import numpy as np

from kvcompress_jax.manager.host_budget import HostBudget
from kvcompress_jax.manager.page import NONE, Page, Sequence
from kvcompress_jax.manager.prefix import Prefix, next_key, root_key
from kvcompress_jax.paged.transfer import RawImage

if TYPE_CHECKING:
    from kvcompress_jax.manager.counters import Counters
    from kvcompress_jax.manager.device import Device
    from kvcompress_jax.manager.free_list import FreeList
    from kvcompress_jax.manager.page_store import PageStore
    from kvcompress_jax.paged.cache import PagedCache

# Tokens after which attending to the past costs as much as the rest of a prefill: the longer a
# prefix, the more each of its tokens cost. Only the order of evictions depends on it.
_ATTENTION_TOKENS = 4096


class PrefixCache:
    """Prefixes by what they hold.

    A tenant finds its own only: its name is part of what is hashed. When pages are needed, those of
    the least valuable prefixes go, by how often they were used, what they cost to make, and the
    memory that they take, aged by what went before (Greedy-Dual-Size-Frequency: Cherkasova, 1998).
    """

    def __init__(
        self,
        store: PageStore,
        counters: Counters,
        device: Device,
        *,
        fingerprint: str,
        window_tokens: int,
        sealed_level: int,
        host_bytes: int,
    ) -> None:
        """
        Args:
          store: of the pages.
          counters: of what happens.
          device: that holds the pools.
          fingerprint: of the model and of the configuration that pages are sealed with.
          window_tokens: that are raw.
          sealed_level: that pages get when they leave the window.
          host_bytes: most memory for raw pages of windows.
        """
        self.prefixes: dict[bytes, Prefix] = {}
        self._store = store
        self._counters = counters
        self._device = device
        self._fingerprint = fingerprint
        self._sealed_level = sealed_level
        self._window_tokens = window_tokens
        self._windows: dict[bytes, RawImage] = {}
        self._budget: HostBudget[bytes] = HostBudget(host_bytes, store.shares)
        self._arriving: list[bytes] = []
        self._heap: list[tuple[float, int, Prefix]] = []
        self._order = itertools.count()
        self._clock = 0.0

    def find(self, tenant: str, tokens: ListOf[int], step_tokens: int) -> Prefix | None:
        """The longest prefix that a prompt begins with, leaving at least one token to be fed.

        Args:
          tenant: whose prompt it is.
          tokens: the prompt.
          step_tokens: it would be fed so many at a time.
        """
        key, best = root_key(self._fingerprint, tenant), None
        ids = np.asarray(tokens, np.int64)
        for end in range(step_tokens, len(tokens), step_tokens):
            key = next_key(key, ids[end - step_tokens : end])
            prefix = self.prefixes.get(key)
            if prefix is None:
                break
            if not prefix.raw_pages or key in self._windows:
                best = prefix
        return best

    def join(self, sequence: Sequence, prefix: Prefix) -> tuple[list[int], RawImage | None]:
        """Gives an empty sequence the pages of a prefix.

        Returns:
          Ids of raw pages to write, and what to write there.

        Raises:
          OutOfPagesError: no room for the raw pages; nothing was changed.
        """
        store = self._store
        raw = store.raw.take(prefix.raw_pages, sequence.tenant)
        for link in prefix.chain():
            for page in link.pages:
                store.adopt(sequence, page)
        first = len(sequence.pages)
        for index, i in enumerate(raw, start=first):
            store.adopt(sequence, store.new_page(index, i, sequence.tenant))
        sequence.length, sequence.settled = prefix.length, first
        self._use(sequence, prefix)
        prefix.uses += 1
        self._rate(prefix)
        self._counters.prefix_hits += 1
        self._counters.prefix_hit_tokens += prefix.length
        if not raw:
            return raw, None
        self._budget.touch(prefix.key)
        return raw, self._windows[prefix.key]

    def remember(self, sequence: Sequence, tokens: ListOf[int], cache: PagedCache) -> None:
        """Remembers the state of a sequence that was just fed a step of its prompt, with nothing
        due; a state that others have too is shared with them from now on.

        A sequence that was forked, preempted, or whose pages could not be sealed in time has
        another state than one that was only fed, and is left alone.
        """
        parent, length = sequence.prefix, sequence.length
        start = 0 if parent is None else parent.length
        if not sequence.shareable or length == start or (parent is not None and parent.gone):
            return
        ids = np.asarray(tokens[start:length], np.int64)
        key = next_key(
            root_key(self._fingerprint, sequence.tenant) if parent is None else parent.key, ids
        )
        sealed = [p for p in sequence.pages if p.sealed != NONE and not p.pending]
        raw = sequence.pages[len(sealed) :]
        if not all(self._in_time(p, length) for p in raw) or not all(map(self._whole, sealed)):
            sequence.shareable = False
            return
        known = sum(len(link.pages) for link in parent.chain()) if parent else 0
        prefix = self.prefixes.get(key)
        if prefix is None:
            prefix = Prefix(key, parent, sequence.tenant, length, tuple(sealed[known:]), len(raw))
            for page in prefix.pages:
                page.kept = True
            if parent is not None:
                parent.children += 1
            self.prefixes[key] = prefix
            self._rate(prefix)
        else:
            self._merge(sequence, prefix, known)
        self._use(sequence, prefix)
        if raw and key not in self._windows:
            self._keep_window(prefix, self._device.export_raw(cache, [p.raw for p in raw]))

    def leave(self, sequence: Sequence) -> None:
        """The sequence ends, or will no longer be fed as its prefix was."""
        sequence.shareable = False
        prefix, sequence.prefix = sequence.prefix, None
        if prefix is not None:
            prefix.users -= 1
            self._offer(prefix)

    def release_pages_of(self, sequence: Sequence) -> None:
        """Forgets the prefixes that hold pages of this sequence alone, which leaves the device."""
        prefix = sequence.prefix
        self.leave(sequence)
        while prefix is not None and not prefix.gone and self._free_to_go(prefix):
            if any(page.owners - {sequence.id} for page in prefix.pages):
                return
            parent = prefix.parent
            self._forget(prefix)
            prefix = parent

    def make_room(self, pool: FreeList, tenant: str, count: int) -> bool:
        """Evicts prefixes until a pool has room for `count` ids of a tenant; whether it has. Those
        of a tenant with a share go for its own needs alone, as do a tenant's for nobody with one.
        """
        if pool.room(tenant) >= count:
            return True
        shares, aside = self._store.shares, []
        while pool.room(tenant) < count and self._heap:
            entry = heapq.heappop(self._heap)
            value, _, prefix = entry
            if prefix.gone or value != prefix.value or not self._free_to_go(prefix):
                continue
            mine = prefix.tenant == tenant or not (prefix.tenant in shares or tenant in shares)
            if not mine:
                aside.append(entry)
                continue
            self._clock = max(self._clock, value)
            self._counters.prefix_evictions += 1
            self._forget(prefix)
        for entry in aside:
            heapq.heappush(self._heap, entry)
        return pool.room(tenant) >= count

    def settle(self) -> None:
        """Ends the copies that `remember` began: what they took on the device is freed."""
        for key in self._arriving:
            if key in self._windows:
                self._windows[key] = jax.tree.map(np.asarray, self._windows[key])
        self._arriving.clear()

    @property
    def used_bytes(self) -> int:
        """Host memory of windows."""
        return self._budget.used_bytes

    def _in_time(self, page: Page, length: int) -> bool:
        """Whether a page that is not sealed is where it should be."""
        size = self._store.layout.page_size
        inside = length - (page.index + 1) * size < self._window_tokens
        return inside and (page.sealed == NONE or page.pending)

    def _whole(self, page: Page) -> bool:
        """Whether a page is at the level that it was due to have, or can come back there."""
        return page.level == self._sealed_level or page.uid in self._store.host

    def _use(self, sequence: Sequence, prefix: Prefix) -> None:
        prefix.users += 1
        old, sequence.prefix = sequence.prefix, prefix
        if old is not None:
            old.users -= 1
            self._offer(old)

    def _rate(self, prefix: Prefix) -> None:
        start = 0 if prefix.parent is None else prefix.parent.length
        cost = (prefix.length - start) * (1 + prefix.length / _ATTENTION_TOKENS)
        prefix.value = self._clock + prefix.uses * cost / max(len(prefix.pages), 1)
        self._offer(prefix)

    def _offer(self, prefix: Prefix) -> None:
        """Puts a prefix that may go where `make_room` finds it."""
        if prefix.gone or not self._free_to_go(prefix):
            return
        if len(self._heap) > 2 * len(self.prefixes) + 64:  # mostly entries that are out of date
            found = [p for p in self.prefixes.values() if self._free_to_go(p)]
            self._heap = [(p.value, next(self._order), p) for p in found]
            heapq.heapify(self._heap)
        else:
            heapq.heappush(self._heap, (prefix.value, next(self._order), prefix))

    @staticmethod
    def _free_to_go(prefix: Prefix) -> bool:
        return not prefix.children and not prefix.users

    def _merge(self, sequence: Sequence, prefix: Prefix, known: int) -> None:
        """Replaces pages of a sequence by those of a prefix that hold the same codes, unless they
        are at a lower level by now."""
        for at, page in enumerate(prefix.pages, start=known):
            own = sequence.pages[at]
            if own is not page and page.level <= own.level:
                sequence.pages[at] = page
                page.owners.add(sequence.id)
                self._store.disown(sequence, own)
                self._counters.pages_merged += 1

    def _keep_window(self, prefix: Prefix, image: RawImage) -> None:
        size = sum(x.nbytes for x in jax.tree.leaves(image))
        for key in self._budget.make_room(size, prefix.tenant):
            del self._windows[key]
            self.prefixes[key].value = 0.0  # nobody can begin there any more
            self._offer(self.prefixes[key])
            self._counters.windows_dropped += 1
        if not self._budget.put(prefix.key, size, prefix.tenant):
            self._counters.windows_dropped += 1
            return
        for x in jax.tree.leaves(image):
            if isinstance(x, jax.Array):
                x.copy_to_host_async()
        self._windows[prefix.key] = image
        self._arriving.append(prefix.key)

    def _forget(self, prefix: Prefix) -> None:
        prefix.gone = True
        del self.prefixes[prefix.key]
        if self._windows.pop(prefix.key, None) is not None:
            self._budget.drop(prefix.key)
        for page in prefix.pages:
            page.kept = False
            self._store.release(page)
        if prefix.parent is not None:
            prefix.parent.children -= 1
            self._offer(prefix.parent)
