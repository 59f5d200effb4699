"""Pages through their life: append, seal, demote, promote, evict, export, import."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kvcompress_jax.config import CompressionConfig
from kvcompress_jax.paged import (
    CacheLayout,
    FineUpload,
    PageIds,
    PoolSizes,
    Retabling,
    Sealing,
    append,
    apply_plan,
    demote,
    evict,
    export_pages,
    import_pages,
    init_cache,
    observe,
    promote,
    read_pages,
    seal,
)
from kvcompress_jax.paged.attention import AttentionMass
from tests.paged.batch import make_batch, poison, reference_page

CONFIG = CompressionConfig(page_size=16, window_tokens=0, fine_bits=4)
LAYOUT = CONFIG.layout(layers=3, kv_heads=2, head_dim=64, dtype="float32")
EVEN = dataclasses.replace(LAYOUT, fine_bits=2)
PARTLY = dataclasses.replace(LAYOUT, fine_bits=2, fine_rows=3)
SIZES = PoolSizes(raw_pages=4, sealed_pages=5, fine_chunks=12, sink_slots=2)

_seal = jax.jit(seal)


def filled(layout=LAYOUT, seed=0):
    """A cache whose raw pages are full."""
    shape = (layout.layers, SIZES.raw_pages, 2, layout.kv_heads, layout.page_size, layout.head_dim)
    raw = jax.random.normal(jax.random.key(seed), shape, jnp.float32).at[..., 1].mul(20.0)
    cache = poison(init_cache(layout, SIZES))
    return dataclasses.replace(
        cache,
        raw=raw.astype(layout.jax_dtype),
        mass=jnp.zeros_like(cache.mass),
        seen=jnp.zeros_like(cache.seen),
        heat=jnp.zeros_like(cache.heat),
    )


def sealing(*entries, layers=3, n=4):
    """Entries of (raw, page, chunks, sink)."""
    pad = n - len(entries)
    return Sealing(
        raw=jnp.array([e[0] for e in entries] + [-1] * pad, jnp.int32),
        page=jnp.array([e[1] for e in entries] + [-1] * pad, jnp.int32),
        chunks=jnp.array([e[2] for e in entries] + [[-1] * layers] * pad, jnp.int32),
        first=jnp.zeros((n,), jnp.int32),
        sink=jnp.array([e[3] for e in entries] + [-1] * pad, jnp.int32),
        count=jnp.int32(len(entries)),
    )


def retabling(*entries, layers=3, n=3):
    pad = n - len(entries)
    return Retabling(
        page=jnp.array([e[0] for e in entries] + [-1] * pad, jnp.int32),
        chunks=jnp.array([e[1] for e in entries] + [[-1] * layers] * pad, jnp.int32),
        count=jnp.int32(len(entries)),
    )


def within_level(cache, page, raw, *, fine_slots, fine_bits=4):
    """Every token is within half a cell of what was sealed: a 32nd of a step in slots refined by
    four bits."""
    for layer in range(cache.layout.layers):
        keys, values = reference_page(cache, layer, page)
        wanted = np.asarray(raw[layer], np.float64)
        order = np.asarray(cache.order[layer, page]).astype(int)
        slot = np.argsort(order, axis=-1)  # [heads, token]
        cells = np.where(slot < fine_slots, 2.0 ** (fine_bits + 1), 2.0)[..., None]
        key_step = np.asarray(cache.key_scale.step[layer, page], np.float64)[:, None]
        value_step = np.take_along_axis(
            np.asarray(cache.value_scale.step[layer, page], np.float64), slot, axis=-1
        )[..., None]
        for got, want, step in ((keys, wanted[0], key_step), (values, wanted[1], value_step)):
            if np.any(np.abs(got - want) > step * (1 / cells + 2.0**-12)):
                return False
    return True


def test_seal_is_within_the_bound_of_its_level():
    cache = filled()
    before = np.asarray(cache.raw)
    cache = _seal(cache, sealing((0, 3, [0, 1, 2], -1), (2, 1, [-1, -1, -1], -1)))
    assert np.array_equal(cache.sealed, [False, True, False, True, False])
    assert within_level(cache, 3, before[:, 0], fine_slots=8)
    assert within_level(cache, 1, before[:, 2], fine_slots=0)
    assert not within_level(cache, 1, before[:, 2], fine_slots=8)
    assert not within_level(cache, 3, before[:, 1], fine_slots=0)
    assert np.array_equal(before, cache.raw)
    assert np.array_equal(np.sort(cache.order[:, 3]), np.broadcast_to(np.arange(16), (3, 2, 16)))


def test_all_tokens_alike_are_within_the_bound_of_six_bits():
    cache = filled(EVEN)
    before = np.asarray(cache.raw)
    cache = _seal(cache, sealing((0, 3, [0, 1, 2], -1), (2, 1, [-1, -1, -1], -1)))
    assert within_level(cache, 3, before[:, 0], fine_slots=16, fine_bits=2)
    assert within_level(cache, 1, before[:, 2], fine_slots=0)  # the base plane alone
    assert not within_level(cache, 3, before[:, 0], fine_slots=16, fine_bits=3)
    assert not within_level(cache, 1, before[:, 2], fine_slots=16, fine_bits=2)
    assert np.all(np.asarray(cache.order[:, 3]) == np.arange(16))
    # The same bytes as of half the tokens at 8 bits.
    assert EVEN.fine_chunk_bytes == LAYOUT.fine_chunk_bytes
    assert EVEN.effective_bits(sealed_pages=4, fine_chunks=12) == LAYOUT.effective_bits(
        sealed_pages=4, fine_chunks=12
    )


def test_some_tokens_are_within_the_bound_of_six_bits():
    cache = filled(PARTLY)
    before = np.asarray(cache.raw)
    cache = _seal(cache, sealing((0, 3, [0, 1, 2], -1), (2, 1, [-1, -1, -1], -1)))
    assert within_level(cache, 3, before[:, 0], fine_slots=6, fine_bits=2)
    assert not within_level(cache, 3, before[:, 0], fine_slots=7, fine_bits=2)
    assert not within_level(cache, 3, before[:, 0], fine_slots=6, fine_bits=3)
    assert within_level(cache, 1, before[:, 2], fine_slots=0)
    assert np.any(np.asarray(cache.order[:, 3]) != np.arange(16))
    assert np.array_equal(np.sort(cache.order[:, 3]), np.broadcast_to(np.arange(16), (3, 2, 16)))


@pytest.mark.parametrize("layout", [LAYOUT, EVEN, PARTLY], ids=["mixed", "even", "partly"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("head_dim", [64, 96, 128, 256])
def test_read_pages_is_the_documented_format(dtype, head_dim, layout):
    layout = dataclasses.replace(layout, dtype=dtype, head_dim=head_dim)
    cache = _seal(filled(layout), sealing((0, 3, [0, 1, 2], -1), (2, 1, [-1, 5, -1], -1)))
    for page in (3, 1):
        for layer in range(3):
            for got, want in zip(
                read_pages(cache, layer, jnp.int32(page)),
                reference_page(cache, layer, page),
                strict=True,
            ):
                assert np.abs(got - want).max() <= 2.0**-20 * np.abs(want).max()
                assert np.abs(got - want[::-1]).max() > 0.1


def test_exact_first_tokens():
    cache = filled()
    cache = dataclasses.replace(cache, raw=cache.raw.at[:, 0, :, :, :4].add(1000.0))
    cache = _seal(cache, sealing((0, 0, [0, 1, 2], 1)))
    assert np.array_equal(cache.sinks[:, 1], cache.raw[:, 0, :, :, :4])
    assert np.all(np.sort(cache.order[:, 0, :, :4]) == np.arange(4))
    # They do not spoil the channels' scales, as they do when they are ordinary tokens.
    plain = _seal(cache, sealing((0, 0, [0, 1, 2], -1)))
    assert np.asarray(cache.key_scale.step[:, 0]).max() < 5
    assert np.asarray(plain.key_scale.step[:, 0], np.float32).min() > 50


@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf, -jnp.inf])
@pytest.mark.parametrize("kind", [0, 1])
def test_a_page_that_is_not_finite_stays_at_level_0_and_spoils_no_other(bad, kind):
    cache = filled()
    cache = dataclasses.replace(cache, sealed=cache.sealed.at[2].set(True))  # a former owner's
    work = sealing((0, 3, [0, 1, 2], 0), (1, 2, [3, 4, 5], -1), (2, 1, [6, 7, 8], -1))
    healthy = _seal(cache, work)
    broken = dataclasses.replace(cache, raw=cache.raw.at[1, 1, kind, 1, 5, 7].set(bad))
    after = _seal(broken, work)
    assert np.array_equal(after.sealed, [False, True, False, True, False])
    assert int(after.rejected) == 1
    assert int(healthy.rejected) == 0
    for pool in ("base", "order"):
        a, b, c = (np.asarray(getattr(x, pool)) for x in (after, healthy, cache))
        assert np.array_equal(a[:, [1, 3]], b[:, [1, 3]])
        assert np.array_equal(a[:, 2], c[:, 2])
    assert np.array_equal(after.fine[3:6], cache.fine[3:6])
    assert np.array_equal(
        np.delete(after.fine, [3, 4, 5], 0), np.delete(healthy.fine, [3, 4, 5], 0)
    )
    assert np.array_equal(after.fine_of[:, 2], [-1, -1, -1])


def test_demotion_moves_no_data():
    cache = _seal(filled(), sealing((0, 3, [0, 1, 2], -1)))
    after = jax.jit(demote)(cache, retabling((3, [-1, 1, -1])))
    for field in dataclasses.fields(cache):
        if field.name in ("fine_of", "layout"):
            continue
        for a, b in zip(
            *(jax.tree.leaves(getattr(x, field.name)) for x in (cache, after)), strict=True
        ):
            assert np.array_equal(a, b, equal_nan=jnp.issubdtype(a.dtype, jnp.floating)), field.name
    assert np.array_equal(after.fine_of[:, 3], [-1, 1, -1])
    # Donated, the compiled program writes into the table alone: nothing else is even copied.
    compiled = jax.jit(demote, donate_argnums=0).lower(cache, retabling()).compile()
    analysis = compiled.memory_analysis()
    assert analysis.temp_size_in_bytes < cache.fine.nbytes / 4
    pools = sum(x.nbytes for x in jax.tree.leaves(cache))
    assert analysis.alias_size_in_bytes >= pools


def test_promotion_after_demotion_is_bit_exact():
    sealed = _seal(filled(), sealing((0, 3, [0, 1, 2], -1)))
    kept = np.asarray(sealed.fine[jnp.array([0, 1, 2])])
    demoted = demote(sealed, retabling((3, [-1, -1, -1])))
    demoted = dataclasses.replace(demoted, fine=jnp.full_like(demoted.fine, 7))  # reused by others
    upload = FineUpload(
        chunk=jnp.array([9, 4, 6, 0], jnp.int32),
        fine=jnp.concatenate([kept, jnp.zeros_like(kept[:1])]),
        count=jnp.int32(3),
    )
    promoted = jax.jit(promote)(demoted, upload, retabling((3, [9, 4, 6])))
    for layer in range(3):
        want = read_pages(sealed, layer, jnp.int32(3))
        got = read_pages(promoted, layer, jnp.int32(3))
        down = read_pages(demoted, layer, jnp.int32(3))
        assert all(np.array_equal(a, b) for a, b in zip(want, got, strict=True))
        assert not any(np.array_equal(a, b) for a, b in zip(want, down, strict=True))
    assert np.all(np.asarray(promoted.fine[0]) == 7)  # padding of the upload is not written


@pytest.mark.parametrize("layout", [LAYOUT, EVEN], ids=["mixed", "even"])
def test_a_demoted_page_is_nearly_the_page_sealed_at_level_2(layout):
    """Forgetting the fine plane gives plain INT4, but where a value lies so near to the middle of
    two base codes that the nearest point of the finer grid belongs to the other one."""
    sealed = _seal(filled(layout), sealing((0, 3, [0, 1, 2], -1)))
    down = demote(sealed, retabling((3, [-1, -1, -1])))
    plain = _seal(filled(layout), sealing((0, 3, [-1, -1, -1], -1)))
    assert np.array_equal(down.base, sealed.base)
    share = 1 / 2**layout.fine_bits / 2  # half a cell of a step, on one side of the middle
    for layer in range(3):
        pair = zip(*(read_pages(c, layer, jnp.int32(3)) for c in (down, plain)), strict=True)
        differ = np.concatenate([np.asarray(a != b).ravel() for a, b in pair]).mean()
        assert 0 < differ < 1.5 * share


def test_evict():
    cache = _seal(filled(), sealing((0, 3, [0, 1, 2], -1), (1, 2, [3, 4, 5], -1)))
    after = jax.jit(evict)(cache, retabling((3, [-1, -1, -1])))
    assert np.array_equal(after.sealed, [False, False, True, False, False])
    assert np.all(np.asarray(after.fine_of[:, 3]) == -1)
    assert np.array_equal(after.fine_of[:, 2], [3, 4, 5])


def test_important_tokens_come_first():
    """Attention decides where errors are alike, and the error where attention is."""
    cache = filled()
    tokens = jnp.arange(16, dtype=jnp.float32)
    cache = dataclasses.replace(
        cache,
        seen=jnp.full_like(cache.seen, 10.0),
        mass=cache.mass.at[:, 0].set(tokens**4 / 16**4 * 10),
        raw=cache.raw.at[:, 1, 1, :, 5].mul(50.0),
    )
    cache = _seal(cache, sealing((0, 3, [0, 1, 2], -1), (1, 2, [3, 4, 5], -1)))
    first = np.asarray(cache.order[:, 3, :, :8]).astype(float)
    assert first.mean() > 8.5
    assert np.all(np.asarray(cache.order[:, 2, :, 0]) == 5)


def test_append_resets_statistics_and_drops_padding():
    cache = filled()
    cache = dataclasses.replace(cache, mass=cache.mass + 1, seen=cache.seen + 1)
    k = jnp.full((3, 2, 64), 5.0)
    slots = jnp.array([17, -1, 3], jnp.int32)
    after = append(cache, 1, k, -k, slots)
    for page, offset in ((1, 1), (0, 3)):
        assert np.all(np.asarray(after.raw[1, page, 0, :, offset]) == 5)
        assert np.all(np.asarray(after.raw[1, page, 1, :, offset]) == -5)
        assert not np.asarray(after.mass[1, page, :, offset]).any()
    assert int((after.raw != cache.raw).sum()) == 2 * 2 * 2 * 64
    assert int((after.mass != 1).sum()) == 2 * 2
    assert int((after.seen != 1).sum()) == 2
    with pytest.raises(ValueError, match=r"k: expected \[3, 2, 64\], got \[3, 2, 32\]"):
        append(cache, 1, k[..., :32], k, slots)


def test_observe_counts_the_queries_that_could_see_a_token():
    batch = make_batch(CompressionConfig(page_size=16, window_tokens=16), [40, 9])
    cache = jax.tree.map(
        lambda x: jnp.zeros_like(x) if jnp.issubdtype(x.dtype, jnp.floating) else x, batch.cache
    )
    table = batch.table()
    mass = AttentionMass(
        sealed=jnp.ones((2, 2, table.sealed.shape[1])),
        raw=jnp.full((2, 2, table.raw.shape[1], 16), 0.5),
    )
    after = observe(cache, 1, table, jnp.array([3, 1], jnp.int32), mass)
    pages = [int(p) for p in table.raw[0, : table.raw_count[0]]]
    starts = [int(i) * 16 for i in table.raw_index[0, : table.raw_count[0]]]
    for page, start in zip(pages, starts, strict=True):
        token = start + np.arange(16)
        want = np.clip(40 - np.maximum(token, 37), 0, None)
        assert np.array_equal(after.seen[1, page], want)
        assert np.all(np.asarray(after.mass[1, page]) == 0.5)
    heat = np.asarray(after.heat)
    held = table.sealed[0, : table.sealed_count[0]]
    assert np.all(heat[held] == 2)
    assert heat.sum() == 2 * len(held)
    assert not np.asarray(after.seen[0]).any()


def test_pages_travel_bit_for_bit():
    cache = _seal(filled(), sealing((0, 3, [0, 1, 2], 1), (1, 2, [-1, 4, -1], -1)))
    there = PageIds(
        raw=jnp.array([2, -1], jnp.int32),
        sealed=jnp.array([3, 2], jnp.int32),
        chunks=jnp.array([[0, 1, 2], [-1, 4, -1]], jnp.int32),
        sink=jnp.array([1, -1], jnp.int32),
    )
    images = jax.jit(export_pages)(cache, there)
    back = PageIds(
        raw=jnp.array([0, -1], jnp.int32),
        sealed=jnp.array([4, 0], jnp.int32),
        chunks=jnp.array([[9, 8, 7], [-1, 6, -1]], jnp.int32),
        sink=jnp.array([0, -1], jnp.int32),
    )
    empty = poison(init_cache(LAYOUT, SIZES))
    after = jax.jit(import_pages)(empty, back, *images)
    assert np.array_equal(after.raw[:, 0], cache.raw[:, 2])
    assert np.array_equal(after.sinks[:, 0], cache.sinks[:, 1])
    assert np.array_equal(after.sealed, [True, False, False, False, True])
    for layer in range(3):
        for new, old in ((4, 3), (0, 2)):
            a, b = (read_pages(c, layer, jnp.int32(p)) for c, p in ((after, new), (cache, old)))
            assert all(np.array_equal(x, y) for x, y in zip(a, b, strict=True))
    assert np.isnan(np.asarray(after.raw[:, 1:])).all()  # nothing else was touched


def test_apply_plan_does_its_parts_in_order():
    """A chunk that one page gives up can go to a page that is sealed by the same plan."""
    from kvcompress_jax.paged import Plan

    cache = _seal(filled(), sealing((0, 3, [0, 1, 2], -1)))
    plan = Plan(tables=retabling((3, [-1, -1, -1])), seals=sealing((1, 2, [0, 1, 2], -1)))
    after = jax.jit(apply_plan)(cache, plan)
    want = _seal(filled(), sealing((1, 2, [0, 1, 2], -1)))
    for layer in range(3):
        a, b = (read_pages(c, layer, jnp.int32(2)) for c in (after, want))
        assert all(np.array_equal(x, y) for x, y in zip(a, b, strict=True))
    assert np.array_equal(after.fine_of[:, 3], [-1, -1, -1])


@pytest.mark.parametrize("head_dim", [64, 96, 128, 256])
@pytest.mark.parametrize("page_size", [16, 64, 256])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_bytes_are_those_of_the_arrays(head_dim, page_size, dtype):
    layout = CacheLayout(
        layers=3,
        kv_heads=2,
        head_dim=head_dim,
        page_size=page_size,
        dtype=dtype,
        fine_rows=page_size // 2,
    )
    cache = jax.eval_shape(lambda: init_cache(layout, SIZES))
    live = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(cache)) - 4  # rejected
    assert SIZES.total_bytes(layout) == live
    assert cache.sizes == SIZES


def test_effective_bits():
    """head_dim 64, page 64: 4 of the plane, 2 x 32 / 64 / 2 of the scales, 1/16 of the order."""
    layout = CacheLayout(layers=30, kv_heads=3, head_dim=64, fine_rows=32)
    expected = 4 + 0.5 + 8 / 128
    got = layout.effective_bits(sealed_pages=10, fine_chunks=0)
    assert expected < got < expected + 0.002  # tables
    assert layout.effective_bits(sealed_pages=10, fine_chunks=300) == pytest.approx(got + 2)
    assert np.isnan(layout.effective_bits(sealed_pages=0, fine_chunks=0))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"page_size": 48}, r"page_size: expected one of \(16, 32, 64, 128, 256\), got 48"),
        ({"head_dim": 65}, "head_dim: expected an even number, got 65"),
        ({"dtype": "int8"}, "dtype: expected one of .*, got 'int8'"),
        (
            {"fine_bits": 2, "fine_rows": 9},
            "fine_bits: expected 4, or 2 with fine_rows of at most 8 ",
        ),
        ({"fine_bits": 3}, "fine_bits: expected 4, or 2 with fine_rows of at most 8 "),
        ({"fine_rows": 17}, r"fine_rows: expected 0 to 16 \(page_size\), got 17"),
        ({"sink_tokens": 16}, r"sink_tokens: expected 0 to 15 \(page_size - 1\), got 16"),
        ({"layers": 0}, "layers: expected at least 1, got 0"),
    ],
)
def test_layout_errors(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(LAYOUT, **change)


def test_pool_errors():
    with pytest.raises(ValueError, match="raw_pages: expected at least 1, got 0"):
        dataclasses.replace(SIZES, raw_pages=0)
    with pytest.raises(ValueError, match="fine_chunks: expected at least 0, got -1"):
        dataclasses.replace(SIZES, fine_chunks=-1)
