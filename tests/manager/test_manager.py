"""Levels by age, heat and pressure; what is refused, and what is reported."""

import logging

import jax.numpy as jnp
import numpy as np
import pytest

from kvcompress_jax.config import CompressionConfig, ConfigError
from kvcompress_jax.manager import KVCacheManager, OutOfPagesError, divide_budget
from kvcompress_jax.manager.free_list import FreeList
from kvcompress_jax.manager.host_tier import HostTier
from kvcompress_jax.paged import PoolSizes, append, init_cache, read_pages

LAYERS = 2


def grown(config, sizes, tokens, *, max_sequences=2, bad=None, dtype="float32"):
    """A manager and cache with one sequence of random tokens."""
    layout = config.layout(layers=LAYERS, kv_heads=1, head_dim=64, dtype=dtype)
    manager = KVCacheManager(layout, sizes, config, max_sequences=max_sequences)
    cache = init_cache(layout, sizes)
    sequence = manager.add()
    return manager, grow(manager, cache, sequence, tokens, bad=bad), sequence


def grow(manager, cache, sequence, tokens, *, bad=None):
    slots = manager.append_slots(sequence, tokens)
    kv = np.random.default_rng(tokens).normal(size=(2, tokens, 1, 64)).astype(np.float32)
    if bad is not None:
        kv[0, bad, 0, 3] = np.inf
    for layer in range(LAYERS):
        cache = append(cache, layer, jnp.asarray(kv[0]), jnp.asarray(kv[1]), slots)
    return manager.advance(cache)


def sizes(raw=12, sealed=12, chunks=24, sinks=3):
    return PoolSizes(raw_pages=raw, sealed_pages=sealed, fine_chunks=chunks, sink_slots=sinks)


def levels(manager):
    stats = manager.get_compression_stats()
    return tuple(stats[f"pages_level_{i}"] for i in range(3))


def test_pages_are_sealed_when_they_leave_the_window():
    config = CompressionConfig(page_size=16, window_tokens=20)
    manager, cache, sequence = grown(config, sizes(), 16 + 19)
    assert levels(manager) == (3, 0, 0)
    cache = grow(manager, cache, sequence, 1)
    assert levels(manager) == (2, 1, 0)
    cache = grow(manager, cache, sequence, 45)
    assert levels(manager) == (3, 3, 0)
    manager.verify(cache)


def test_a_seal_is_started_a_token_ahead():
    """The device has the code before the page leaves the window; who attends finds it raw."""
    config = CompressionConfig(page_size=16, window_tokens=20)
    manager, cache, sequence = grown(config, sizes(), 16 + 19)
    (page,) = manager.store.pending
    assert page.index == 0 and bool(cache.sealed[page.sealed])
    assert manager.table([sequence]).raw_count[0] == 3 and manager.counters.seals == 0
    cache = manager.advance(cache)  # its owner did not grow: nor does anything change
    assert list(manager.store.pending) == [page]
    manager.device.apply = None  # nothing more is asked of it
    cache = grow(manager, cache, sequence, 1)
    assert manager.table([sequence]).raw_count[0] == 2 and manager.counters.seals == 1
    assert not manager.store.pending
    manager.verify(cache)


@pytest.mark.parametrize("tokens", [16 + 19, 16 + 18])
def test_preemption_ahead_of_a_seal_changes_nothing(tokens):
    config = CompressionConfig(page_size=16, window_tokens=20)
    found = []
    for preempted in (False, True):
        manager, cache, sequence = grown(config, sizes(), tokens)
        if preempted:
            manager.preempt(sequence, cache)
            assert manager.sealed.used == 0 and not manager.store.pending
            manager.verify(cache)
            cache = manager.resume(sequence, cache)
        for _ in range(2):
            cache = grow(manager, manager.advance(cache), sequence, 1)
            assert manager.counters.seals == (manager.length(sequence) >= 16 + 20)
        manager.verify(cache)
        page = manager.sequences[sequence].pages[0]
        ids = np.array([page.sealed])
        found.append([np.asarray(x) for i in range(LAYERS) for x in read_pages(cache, i, ids)])
    for a, b in zip(*found, strict=True):
        assert np.array_equal(a, b)


def test_a_shared_page_waits_for_its_youngest_owner():
    config = CompressionConfig(page_size=16, window_tokens=16)
    manager, cache, first = grown(config, sizes(), 32)
    second = manager.fork(first)
    cache = manager.advance(cache)
    assert levels(manager) == (1, 1, 0)
    cache = grow(manager, cache, first, 32)
    # Page 1 is old enough for the first, not for the second; page 2 is the first's own.
    assert levels(manager) == (2, 2, 0)
    cache = grow(manager, cache, second, 16)
    assert levels(manager) == (2, 3, 0)
    manager.verify(cache)


def test_old_pages_are_demoted_unless_they_are_hot():
    config = CompressionConfig(page_size=16, window_tokens=0, demote_after_tokens=32)
    manager, cache, sequence = grown(config, sizes(), 80)
    # 5 pages; those whose last token is 32 or more tokens old: 0, 1, 2.
    assert levels(manager) == (0, 2, 3)
    assert manager.counters.demotions == 3
    manager, cache, sequence = grown(config, sizes(), 32)
    heat = np.zeros(12, np.float32)
    heat[manager.pages[0].sealed] = 5.0
    manager.report_heat(heat)
    cache = grow(manager, cache, sequence, 64)
    assert manager.pages[0].level == 1
    assert manager.pages[1].level == 2
    manager.verify(cache)


def test_pressure_demotes_the_coldest_page():
    config = CompressionConfig(page_size=16, window_tokens=0)
    manager, cache, sequence = grown(config, sizes(chunks=3 * LAYERS), 48)
    assert levels(manager) == (0, 3, 0)
    heat = np.zeros(12, np.float32)
    for page, value in zip(manager.pages.values(), (3.0, 1.0, 2.0), strict=True):
        heat[page.sealed] = value
    manager.report_heat(heat)
    cache = grow(manager, cache, sequence, 16)
    assert [p.level for p in manager.pages.values()] == [1, 2, 1, 1]
    assert manager.counters.demotions == 1
    manager.verify(cache)


def test_without_chunks_pages_start_at_level_2():
    config = CompressionConfig(page_size=16, window_tokens=0)
    manager, cache, _ = grown(config, sizes(chunks=LAYERS - 1), 32)
    assert levels(manager) == (0, 0, 2)
    assert manager.counters.unrefined == 2
    manager.verify(cache)


def test_with_two_levels_pages_wait_for_chunks():
    config = CompressionConfig(page_size=16, window_tokens=0, levels=2)
    manager, cache, sequence = grown(config, sizes(chunks=2 * LAYERS), 48)
    assert levels(manager) == (1, 2, 0)
    assert manager.counters.unrefined == 0
    manager.evict(sequence, [0])
    cache = manager.advance(cache)
    assert levels(manager) == (0, 2, 0)
    manager.verify(cache)


def test_hot_pages_come_back_bit_for_bit_and_do_not_flap():
    config = CompressionConfig(
        page_size=16, window_tokens=0, demote_after_tokens=0, host_bytes=10**6, promote_heat=2.0
    )
    manager, cache, _ = grown(config, sizes(), 48)
    before = CompressionConfig(page_size=16, window_tokens=0)
    _, want, _ = grown(before, sizes(), 48)
    assert levels(manager) == (0, 0, 3)
    page = manager.pages[1]
    heat = np.zeros(12, np.float32)
    heat[page.sealed] = 1.0
    manager.report_heat(heat)
    cache = manager.advance(cache)
    assert page.level == 1
    for layer in range(LAYERS):
        got = read_pages(cache, layer, jnp.int32(page.sealed))
        exact = read_pages(want, layer, jnp.int32(1))
        assert all(np.array_equal(a, b) for a, b in zip(got, exact, strict=True))
    changes = manager.counters.promotions, manager.counters.demotions
    assert changes == (1, 3)
    for _ in range(5):
        cache = manager.advance(cache)
    assert changes == (manager.counters.promotions, manager.counters.demotions)
    manager.report_heat(np.zeros(12, np.float32))  # it cooled down
    cache = manager.advance(cache)
    assert page.level == 2
    manager.verify(cache)


def test_a_hot_page_displaces_the_coldest_one():
    config = CompressionConfig(page_size=16, window_tokens=0, host_bytes=10**6)
    manager, cache, sequence = grown(config, sizes(chunks=2 * LAYERS), 32)
    cache = grow(manager, cache, sequence, 16)
    assert [p.level for p in manager.pages.values()] == [2, 1, 1]
    heat = np.zeros(12, np.float32)
    for page, value in zip(manager.pages.values(), (9.0, 3.0, 2.0), strict=True):
        heat[page.sealed] = value
    manager.report_heat(heat)
    cache = manager.advance(cache)
    assert [p.level for p in manager.pages.values()] == [1, 1, 2]
    _, want, _ = grown(config, sizes(), 32)
    for layer in range(LAYERS):
        got = read_pages(cache, layer, jnp.int32(manager.pages[0].sealed))
        exact = read_pages(want, layer, jnp.int32(0))
        assert all(np.array_equal(a, b) for a, b in zip(got, exact, strict=True))
    manager.verify(cache)


def test_promotion_without_a_kept_plane_is_refused_and_counted():
    config = CompressionConfig(page_size=16, window_tokens=0)
    manager, cache, sequence = grown(config, sizes(), 32)
    manager.demote_pages(sequence, [0])
    cache = manager.advance(cache)
    manager.promote_pages(sequence, [0, 1])
    cache = manager.advance(cache)
    assert levels(manager) == (0, 1, 1)
    assert manager.counters.refusals == 2
    assert manager.counters.promotions == 0


def test_one_owner_does_not_demote_for_another():
    config = CompressionConfig(page_size=16, window_tokens=0)
    manager, cache, first = grown(config, sizes(), 32)
    manager.fork(first)
    manager.demote_pages(first, [0, 1])
    cache = manager.advance(cache)
    assert levels(manager) == (0, 2, 0)


def test_a_page_that_is_not_finite_stays_raw_and_is_named(caplog):
    config = CompressionConfig(page_size=16, window_tokens=0)
    with caplog.at_level(logging.WARNING):
        manager, cache, _ = grown(config, sizes(), 48, bad=20)
    assert levels(manager) == (1, 2, 0)
    assert manager.counters.rejected == 1 == int(cache.rejected)
    assert "page stays at level 0: keys: expected finite values, got 1 that are not" in caplog.text
    assert "layer 0, head 0, page 1" in caplog.text
    manager.verify(cache)


def test_stats_count_every_byte_in_use():
    config = CompressionConfig(page_size=16, window_tokens=16)
    manager, _, _ = grown(config, sizes(), 60, dtype="bfloat16")
    stats, layout = manager.get_compression_stats(), manager.layout
    assert levels(manager) == (2, 2, 0)
    entries = 4 * 8
    want = (
        2 * layout.raw_page_bytes
        + 2 * (layout.sealed_page_bytes + LAYERS * layout.fine_chunk_bytes)
        + layout.sink_slot_bytes
        + entries
    )
    assert stats["allocated_bytes"] == want
    plain = 4 * LAYERS * 2 * 16 * 64 * 2
    assert stats["uncompressed_bytes"] == plain
    assert stats["memory_saved_mb"] == pytest.approx((plain - want) / 1e6)
    assert stats["avg_compression_ratio"] == pytest.approx(plain / want)
    assert stats["tokens"] == 60
    assert stats["pool_bytes"] >= want - entries
    empty = KVCacheManager(layout, manager.sizes, config, max_sequences=1)
    assert empty.get_compression_stats()["avg_compression_ratio"] == 1.0


def test_verify_sees_what_is_wrong():
    config = CompressionConfig(page_size=16, window_tokens=0)
    manager, cache, sequence = grown(config, sizes(), 40)
    manager.verify(cache)
    manager.pages[0].chunks = (5, 5)
    manager.sequences[sequence].pages[1].owners.add(77)
    with pytest.raises(AssertionError) as wrong:
        manager.verify(cache)
    assert "fine chunks used twice: expected [], got [5]" in str(wrong.value)
    assert "page 1: owners: expected {0}, got {0, 77}" in str(wrong.value)
    assert "page 0: fine_of" in str(wrong.value)


def test_preempted_sequences_take_host_memory_only():
    config = CompressionConfig(page_size=16, window_tokens=16)
    manager, cache, sequence = grown(config, sizes(), 70)
    before = manager.get_compression_stats()
    manager.preempt(sequence, cache)
    stats = manager.get_compression_stats()
    assert stats["allocated_bytes"] == 0 < stats["host_bytes"]
    assert (stats["sequences"], stats["preempted_sequences"]) == (0, 1)
    for call in (
        lambda: manager.append_slots(sequence, 1),
        lambda: manager.table([sequence]),
        lambda: manager.preempt(sequence, cache),
    ):
        with pytest.raises(ValueError, match="expected one on the device, it is preempted"):
            call()
    cache = manager.resume(sequence, cache)
    after = manager.get_compression_stats()
    assert after["allocated_bytes"] == before["allocated_bytes"]
    with pytest.raises(ValueError, match="sequence 0: expected a preempted one"):
        manager.resume(sequence, cache)
    manager.verify(cache)


def test_a_newcomer_demotes_nobody():
    """The first page of a tenant is sealed when the pages at level 1 are all another's."""
    config = CompressionConfig(page_size=16, window_tokens=0)
    layout = config.layout(layers=LAYERS, kv_heads=1, head_dim=64, dtype="float32")
    manager = KVCacheManager(
        layout, sizes(chunks=8), config, max_sequences=4, tenant_shares={"a": 0.5}
    )
    cache = grow(manager, init_cache(layout, sizes(chunks=8)), manager.add(""), 32)
    assert levels(manager) == (0, 2, 0)  # all chunks that are not kept for "a"
    cache = grow(manager, cache, manager.add("b"), 16)
    assert levels(manager) == (0, 2, 1)
    assert manager.get_compression_stats()["demotions"] == 0
    manager.verify(cache)


def test_plans_must_be_confirmed():
    config = CompressionConfig(page_size=16, window_tokens=0)
    layout = config.layout(layers=LAYERS, kv_heads=1, head_dim=64)
    manager = KVCacheManager(layout, sizes(), config, max_sequences=1)
    manager.append_slots(manager.add(), 16)
    cache, _ = manager.device.apply(init_cache(layout, sizes()), manager.plan())
    with pytest.raises(RuntimeError, match="plan: expected the last plan to be confirmed"):
        manager.plan()
    with pytest.raises(RuntimeError, match="look_ahead: expected the last plan to be confirmed"):
        manager.look_ahead(cache)
    cache = manager.advance(cache)
    manager.verify(manager.look_ahead(cache))


def test_errors_name_the_thing():
    config = CompressionConfig(page_size=16)
    layout = config.layout(layers=LAYERS, kv_heads=1, head_dim=64)
    manager = KVCacheManager(layout, sizes(raw=2), config, max_sequences=1)
    sequence = manager.add()
    with pytest.raises(OutOfPagesError, match="sequences: expected 1 free, got 0 of 1"):
        manager.add()
    with pytest.raises(OutOfPagesError, match="raw pages: expected 3 free, got 2 of 2"):
        manager.append_slots(sequence, 33)
    with pytest.raises(ValueError, match="tokens: expected at least 1, got 0"):
        manager.append_slots(sequence, 0)
    with pytest.raises(ValueError, match="sequence: expected a live one, got 9"):
        manager.free(9)
    with pytest.raises(ValueError, match="indices: expected full pages of the sequence, got 0"):
        manager.evict(sequence, [0])


@pytest.mark.parametrize(
    "config",
    [
        CompressionConfig(enabled=False),
        CompressionConfig(),
        CompressionConfig(seal_level=2, floor_layers=(0, -1)),
        CompressionConfig(levels=2, page_size=128),
    ],
)
@pytest.mark.parametrize("budget", [100_000_000, 1_000_000_000])
def test_budgets_are_kept_and_used(config, budget):
    layout = config.layout(layers=30, kv_heads=3, head_dim=64)
    found = divide_budget(layout, config, budget_bytes=budget, max_sequences=8, step_tokens=256)
    used = found.total_bytes(layout)
    one_more = layout.sealed_page_bytes + 30 * layout.fine_chunk_bytes + layout.raw_page_bytes
    assert budget - one_more <= used <= budget


def test_a_floor_layer_that_is_named_twice_has_room_once():
    def pools(*floors):
        config = CompressionConfig(seal_level=2, floor_layers=floors)
        layout = config.layout(layers=30, kv_heads=3, head_dim=64)
        sizes = {"max_sequences": 8, "step_tokens": 256}
        return divide_budget(layout, config, budget_bytes=100_000_000, **sizes)

    assert pools(0, -30) == pools(0) != pools(0, -1)


def test_compression_makes_room_for_more_tokens():
    tokens = {}
    for name in ("off", "safe", "balanced", "compact"):
        config = (
            CompressionConfig(enabled=False) if name == "off" else CompressionConfig.recipe(name)
        )
        layout = config.layout(layers=32, kv_heads=8, head_dim=128)
        found = divide_budget(
            layout, config, budget_bytes=8 * 2**30, max_sequences=16, step_tokens=512
        )
        pages = found.sealed_pages if config.compresses else found.raw_pages
        tokens[name] = pages * config.page_size
    assert tokens["safe"] > 1.7 * tokens["off"]
    assert tokens["balanced"] > 2.3 * tokens["off"]
    assert tokens["compact"] > 3.3 * tokens["off"]


def test_a_budget_that_is_too_small_is_refused():
    config = CompressionConfig()
    layout = config.layout(layers=30, kv_heads=3, head_dim=64)
    with pytest.raises(ConfigError, match=r"budget_bytes: expected at least .* raw pages"):
        divide_budget(layout, config, budget_bytes=10**6, max_sequences=8, step_tokens=256)
    off = CompressionConfig(enabled=False)
    with pytest.raises(ConfigError, match=r"budget_bytes: expected at least .*a page for each"):
        divide_budget(layout, off, budget_bytes=10**5, max_sequences=8, step_tokens=256)


def test_free_lists_refuse_what_is_not_theirs():
    ids = FreeList("pages", 3)
    taken = ids.take(2)
    ids.give_back(taken[:1])
    for wrong in (taken[:1], [7], [-1]):
        with pytest.raises(ValueError, match="pages: expected an id in use, got"):
            ids.give_back(wrong)
    assert ids.free == 2


def test_the_host_tier_keeps_its_budget():
    planes = np.zeros(100, np.uint8)
    tier = HostTier(250)
    for uid in range(3):
        tier.put(uid, planes + np.uint8(uid))
    assert 0 not in tier and 1 in tier and 2 in tier
    assert (tier.used_bytes, tier.dropped) == (200, 1)
    tier.put(9, np.zeros(300, np.uint8))
    assert 9 not in tier and tier.dropped == 2
    assert tier.take(2)[0] == 2
    tier.drop(1)
    tier.drop(1)
    assert tier.used_bytes == 0 == len(tier)
