"""The check that what the manager reports is true."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable
from typing import TYPE_CHECKING

import jax
import numpy as np

from kvcompress_jax.manager.page import NONE
from kvcompress_jax.paged.cache import PagedCache

if TYPE_CHECKING:
    from kvcompress_jax.manager.kv_manager import KVCacheManager

Expect = Callable[[str, object, object], None]


def verify(manager: KVCacheManager, cache: PagedCache) -> None:
    """Raises AssertionError with a line for everything that does not add up."""
    wrong: list[str] = []

    def expect(what: str, expected: object, got: object) -> None:
        if expected != got:
            wrong.append(f"{what}: expected {expected}, got {got}")

    _verify_ids(manager, expect)
    _verify_sequences(manager, expect)
    _verify_prefixes(manager, expect)
    _verify_device(manager, cache, expect)
    _verify_tiers(manager, wrong, expect)
    if wrong:
        raise AssertionError("\n".join(wrong))


def _verify_ids(manager: KVCacheManager, expect: Expect) -> None:
    """Every id in use has one holder, who belongs to the tenant that it is counted for."""
    pages = list(manager.pages.values())
    for pool, held in (
        (manager.raw, [(p.raw, p.tenant) for p in pages]),
        (manager.sealed, [(p.sealed, p.tenant) for p in pages]),
        (manager.sinks, [(p.sink, p.tenant) for p in pages]),
        (manager.chunks, [(c, p.tenant) for p in pages for c in p.chunks]),
        (manager.rows, [(s.row, s.tenant) for s in manager.sequences.values()]),
    ):
        named = Counter(i for i, _ in held if i != NONE)
        expect(f"{pool.name} used twice", [], [i for i, n in named.items() if n > 1])
        expect(f"{pool.name} used but free", [], [i for i in named if not pool.is_used(i)])
        expect(f"{pool.name} in use", len(named), pool.used)
        for tenant in manager.store.shares:
            theirs = sum(i != NONE and t == tenant for i, t in held)
            expect(f"{pool.name} of tenant {tenant!r}", theirs, pool.used_by(tenant))
            expect(
                f"{pool.name} of {tenant!r} over its share", 0, max(0, theirs - pool.most(tenant))
            )
    store = manager.store
    for i, page in enumerate(store.holder):
        expect(f"sealed page {i}, in use", page is not None, store.sealed.is_used(i))
        if page is not None:
            level = 0 if page.pending else page.level
            expect(f"sealed page {i}: uid", page.uid, int(store.uid[i]))
            expect(f"sealed page {i}: level", level, int(store.level[i]))


def _verify_sequences(manager: KVCacheManager, expect: Expect) -> None:
    """Sequences and pages name each other, and the tables say the same."""
    size = manager.layout.page_size
    for page in manager.pages.values():
        owners = {s.id: s for s in manager.sequences.values() if page in s.pages}
        expect(f"page {page.uid}: owners", set(owners), page.owners)
        expect(f"page {page.uid}: held by somebody", True, bool(page.owners or page.kept))
        expect(
            f"page {page.uid}: tenants",
            {page.tenant},
            {s.tenant for s in owners.values()} or {page.tenant},
        )
        if any(s.length < (page.index + 1) * size for s in owners.values()):
            expect(f"page {page.uid}, unfinished: number of owners", 1, len(owners))
    for sequence in manager.sequences.values():
        name = f"sequence {sequence.id}"
        indices = [p.index for p in sequence.pages]
        expect(f"{name}: order of pages", sorted(set(indices)), indices)
        pages_needed = -(-sequence.length // size)
        expect(f"{name}: pages past its end", [], [i for i in indices if i >= pages_needed])
        if sequence.row == NONE:
            continue
        table = manager.table([sequence.id])
        expect(f"{name}: length", sequence.length, int(table.length[0]))
        sealed = {(p.index, p.sealed) for p in sequence.pages if p.sealed != NONE and not p.pending}
        raw = {(p.index, p.raw) for p in sequence.pages if p.sealed == NONE or p.pending}
        for kind, pages, ids, index, count in (
            ("sealed", sealed, table.sealed, table.sealed_index, table.sealed_count),
            ("raw", raw, table.raw, table.raw_index, table.raw_count),
        ):
            n = int(count[0])
            entries = list(zip(index[0, :n].tolist(), ids[0, :n].tolist(), strict=True))
            expect(f"{name}: table of {kind} pages", sorted(pages), sorted(entries))
        sink = [p.sink for p in sequence.pages if p.index == 0 and not p.pending]
        expect(f"{name}: sink", sink[0] if sink else NONE, int(table.sink[0]))


def _verify_prefixes(manager: KVCacheManager, expect: Expect) -> None:
    """Pages are kept for prefixes alone, and these for who uses them."""
    prefixes = list(manager.prefixes.prefixes.values())
    held = Counter(page.uid for prefix in prefixes for page in prefix.pages)
    expect("pages of two prefixes", [], [uid for uid, n in held.items() if n > 1])
    kept = sorted(page.uid for page in manager.pages.values() if page.kept)
    expect("pages kept for prefixes", sorted(held), kept)
    children = Counter(prefix.parent.key for prefix in prefixes if prefix.parent)
    users = Counter(s.prefix.key for s in manager.sequences.values() if s.prefix)
    for prefix in prefixes:
        name = f"prefix of {prefix.length} tokens"
        expect(f"{name}: children", children[prefix.key], prefix.children)
        expect(f"{name}: users", users[prefix.key], prefix.users)
        expect(
            f"{name}: tenants", {prefix.tenant}, {prefix.tenant, *(p.tenant for p in prefix.pages)}
        )
    expect(
        "prefixes in use that are gone",
        set(),
        (set(children) | set(users)) - set(manager.prefixes.prefixes),
    )


def _verify_device(manager: KVCacheManager, cache: PagedCache, expect: Expect) -> None:
    """The pools have the bytes that are claimed, and hold the codes that are claimed."""
    expect("sizes of the pools", manager.sizes, cache.sizes)
    claimed = manager.device_sizes.total_bytes(manager.device_layout)
    pools = jax.tree.leaves(dataclasses.replace(cache, code=None, feedback=None, rejected=None))  # type: ignore[arg-type]
    live: Counter[object] = Counter()
    for pool in pools:
        if isinstance(pool, jax.Array):
            live.update({part.device: part.data.nbytes for part in pool.addressable_shards})
        else:
            live["host"] += pool.nbytes
    expect("devices of the pools", manager.devices, len(live))
    for device, nbytes in live.items():
        expect(f"bytes of the pools on {device}", claimed, nbytes)
    fine_of, sealed = np.asarray(cache.fine_of), np.asarray(cache.sealed)
    for page in manager.pages.values():
        if page.sealed != NONE and not page.pending:
            expect(f"page {page.uid}: fine_of", page.chunks, tuple(fine_of[:, page.sealed]))
            expect(f"page {page.uid}: sealed", True, bool(sealed[page.sealed]))


def _verify_tiers(manager: KVCacheManager, wrong: list[str], expect: Expect) -> None:
    """Host memory and disk have the bytes that are claimed, within their budgets."""
    host = manager.host
    expect("bytes of the host tier", host.used_bytes, host.measured_bytes())
    expect("host tier over its budget", 0, max(0, host.used_bytes - host.budget_bytes))
    if host.disk is not None:
        try:
            host.disk.verify()
        except (AssertionError, TimeoutError) as e:
            wrong.append(str(e))
