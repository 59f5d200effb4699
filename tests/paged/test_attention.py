"""`attend` against dense float64 attention that reads the same bytes."""

import dataclasses
import functools
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kvcompress_jax.config import CompressionConfig
from kvcompress_jax.kernels.decode_attention.cpu import MOST_QUERIES
from kvcompress_jax.paged import PagedCache, PoolSizes, attend, init_cache
from kvcompress_jax.paged.attention_xla import attend_xla
from tests.paged.batch import make_batch, reference_attention, reference_tokens

# Logits are float32 sums of `dim` products, each input rounded: an error of some
# sqrt(dim) * 2**-24 * |logit|, with logits below 100 here, and the weights' relative error is the
# logits' absolute one.
TOLERANCE = 100 * 16 * 2.0**-24

_attend = jax.jit(
    attend,
    static_argnames=("scale", "soft_cap", "return_mass", "implementation"),
)


def judge(batch, q, result, *, layer, query_lengths, scale, window=0, soft_cap=None):
    """Largest error of out, lse and mass, relative to the size of the values; infinite where
    padding got something, and NaN, which is never small enough, where there is any."""
    out, lse, mass = (jax.tree.map(np.asarray, x) for x in result)
    table, worst = batch.table(), 0.0
    heads = batch.cache.layout.kv_heads
    for row, n in enumerate(query_lengths):
        if out[row, n:].any() or np.any(lse[row, n:] != -np.inf):
            return np.inf
        if n == 0:
            continue
        position, page, keys, values = reference_tokens(batch.cache, table, row, layer)
        want_out, want_lse, weights = reference_attention(
            q[row, :n],
            position,
            keys,
            values,
            int(table.length[row]) - n,
            scale=scale,
            window=window,
            soft_cap=soft_cap,
        )
        # Of NumPy: Python's max() passes over NaN.
        errors = [worst, np.abs(out[row, :n] - want_out).max() / np.abs(values).max()]
        worst = np.max([*errors, np.abs(lse[row, :n] - want_lse).max()])
        if mass is None:
            continue
        per_token = weights.reshape(n, heads, -1, weights.shape[-1]).sum(axis=(0, 2))
        sinks = batch.cache.layout.sink_tokens if table.sink[row] >= 0 else 0
        for column in range(int(table.sealed_count[row])):
            here = (page == column) & (position >= sinks)
            got = mass.sealed[row, :, column]
            worst = np.maximum(worst, np.abs(got - per_token[:, here].sum(1)).max() / n)
        for column in range(int(table.raw_count[row])):
            here = page == table.sealed.shape[1] + column
            got = mass.raw[row, :, column]
            if got[:, here.sum() :].any():
                return np.inf
            error = np.abs(got[:, : here.sum()] - per_token[:, here]).max() / n
            worst = np.maximum(worst, error)
    return worst


IMPLEMENTATION = None


@pytest.fixture(params=["cpu", "xla"])
def by(request, monkeypatch):
    """Both that run on a CPU, whichever of them would be chosen."""
    monkeypatch.setattr(sys.modules[__name__], "IMPLEMENTATION", request.param)


both = pytest.mark.usefixtures("by")


def run(batch, *, queries, query_lengths, group=3, layer=1, seed=1, dtype=jnp.float32, **options):
    layout = batch.cache.layout
    if IMPLEMENTATION == "cpu" and queries * group > MOST_QUERIES:
        pytest.skip("left to XLA")
    shape = (len(query_lengths), queries, layout.kv_heads * group, layout.head_dim)
    q = jax.random.normal(jax.random.key(seed), shape, jnp.float32).astype(dtype)
    scale = layout.head_dim**-0.5 / 4  # the outlier channel makes large logits
    lengths = jnp.asarray(query_lengths, jnp.int32)
    options = {"scale": scale, "return_mass": True, "implementation": IMPLEMENTATION} | options
    result = _attend(q, batch.cache, layer, batch.table(), query_lengths=lengths, **options)
    return q, result, scale


CONFIG = CompressionConfig(page_size=16, window_tokens=16)


@both
@pytest.mark.parametrize(
    "config",
    [
        CONFIG,
        CompressionConfig(page_size=32, window_tokens=0, sink_tokens=0),
        CompressionConfig(page_size=64, window_tokens=64, ratio=0.25),
        CompressionConfig(page_size=16, levels=2),
        CompressionConfig(page_size=16, seal_level=2, window_tokens=0, sink_tokens=8),
        CompressionConfig(page_size=16, seal_level=2, floor_layers=(-1,)),
        CompressionConfig(page_size=16, enabled=False),
        CompressionConfig(page_size=256, window_tokens=0),
    ],
    ids=lambda c: f"page{c.page_size}-levels{c.levels}-seal{c.seal_level}-on{c.enabled}",
)
def test_decode(config):
    batch = make_batch(config, [1, 17, 64, 203, 300, 512])
    ones = [1] * 6
    q, result, scale = run(batch, queries=1, query_lengths=ones)
    judged = {"layer": 1, "query_lengths": ones, "scale": scale}
    assert judge(batch, q, result, **judged) <= TOLERANCE
    # Another layer's pages, another scale, or a row's neighbour are not the same.
    assert judge(batch, q, result, **(judged | {"layer": 0})) > 100 * TOLERANCE
    assert judge(batch, q, result, **(judged | {"scale": scale * 1.01})) > 10 * TOLERANCE
    swapped = jax.tree.map(lambda x: x[::-1], result)
    assert judge(batch, q[::-1], swapped, **judged) > 100 * TOLERANCE


@both
@pytest.mark.parametrize("head_dim", [64, 96, 128, 256])
@pytest.mark.parametrize("group", [1, 4, 7])
def test_head_sizes_and_groups(head_dim, group):
    batch = make_batch(CONFIG, [40, 100], head_dim=head_dim, kv_heads=2)
    q, result, scale = run(batch, queries=1, query_lengths=[1, 1], group=group)
    assert judge(batch, q, result, layer=1, query_lengths=[1, 1], scale=scale) <= TOLERANCE


@pytest.mark.parametrize("lengths", [[5, 1, 12, 0], [12, 12, 12, 12], [1, 1, 1, 1], [0, 0, 0, 3]])
def test_mixed_batches_of_decode_and_chunked_prefill(lengths):
    batch = make_batch(CONFIG, [21, 70, 48, 130])
    q, result, scale = run(batch, queries=12, query_lengths=lengths)
    judged = {"layer": 1, "query_lengths": lengths, "scale": scale}
    assert judge(batch, q, result, **judged) <= TOLERANCE
    if sum(lengths) > 3:  # queries of a chunk see as far as they stand
        late = jax.tree.map(lambda x: jnp.roll(x, 1, axis=1), result[:2])
        assert judge(batch, q, (*late, None), **judged) > 100 * TOLERANCE


@both
@pytest.mark.parametrize("window", [1, 20, 64, 1000])
def test_sliding_window(window):
    batch = make_batch(CONFIG, [21, 70, 200])
    lengths = [3, 4, 1]
    q, result, scale = run(batch, queries=4, query_lengths=lengths, window=jnp.int32(window))
    judged = {"layer": 1, "query_lengths": lengths, "scale": scale}
    assert judge(batch, q, result, **judged, window=window) <= TOLERANCE
    if window < 100:
        assert judge(batch, q, result, **judged, window=window + 1) > TOLERANCE


@both
def test_no_window_is_a_window_of_zero():
    batch = make_batch(CONFIG, [21, 70, 200])
    q, result, scale = run(batch, queries=4, query_lengths=[3, 4, 1], window=jnp.int32(0))
    judged = {"layer": 1, "query_lengths": [3, 4, 1], "scale": scale}
    assert judge(batch, q, result, **judged) <= TOLERANCE


@both
def test_soft_cap():
    batch = make_batch(CONFIG, [21, 70, 200])
    ones = [1, 1, 1]
    q, result, scale = run(batch, queries=1, query_lengths=ones, soft_cap=2.0)
    judged = {"layer": 1, "query_lengths": ones, "scale": scale}
    assert judge(batch, q, result, **judged, soft_cap=2.0) <= TOLERANCE
    assert judge(batch, q, result, **judged) > 100 * TOLERANCE


@both
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_low_precision_caches_and_queries(dtype):
    batch = make_batch(CONFIG, [21, 70, 200], dtype=dtype)
    ones = [1, 1, 1]
    q, result, scale = run(batch, queries=1, query_lengths=ones, dtype=jnp.dtype(dtype))
    assert result[0].dtype == jnp.dtype(dtype)
    rounding = float(jnp.finfo(dtype).eps)  # of the output; everything before is float32
    judged = {"layer": 1, "query_lengths": ones, "scale": scale}
    assert judge(batch, q, result, **judged) <= TOLERANCE + rounding


@both
@pytest.mark.parametrize("options", [{}, {"fine_bits": 2}, {"fine_bits": 2, "ratio": 0.2}], ids=str)
def test_pages_of_any_level(options):
    """With fine planes of four bits and of two, of some tokens and of all; some with none."""
    batch = make_batch(dataclasses.replace(CONFIG, **options), [40, 200], dtype="bfloat16")
    assert (batch.cache.fine_of >= 0).any() and (batch.cache.fine_of < 0).any()
    lengths = [5, 3]
    q, result, scale = run(batch, queries=5, query_lengths=lengths)
    judged = {"layer": 1, "query_lengths": lengths, "scale": scale}
    assert judge(batch, q, result, **judged) <= TOLERANCE
    flat = dataclasses.replace(batch.cache, fine=batch.cache.fine ^ jnp.uint8(0x88))
    assert judge(dataclasses.replace(batch, cache=flat), q, result, **judged) > 10 * TOLERANCE


def check_nan(attention, config=CONFIG, head_dim=64):
    """Judges `attention(batch, q)`, giving out, lse and mass of layer 1: NaN in a key is in the
    results of those who see it, of nobody else, and in nobody's mass."""
    batch = make_batch(config, [40, 200], head_dim=head_dim, dtype="bfloat16")
    group, table = 2, batch.table()
    q = jax.random.normal(jax.random.key(5), (2, 2, 2 * group, head_dim)).astype(jnp.bfloat16)
    last = int(table.length[1]) - 1
    page = int(table.raw[1, int(table.raw_count[1]) - 1])
    raw = batch.cache.raw.at[1, page, 0, 0, last % config.page_size].set(jnp.nan)
    cache = dataclasses.replace(batch.cache, raw=raw)
    before, after = (
        jax.tree.map(lambda x: np.asarray(x, np.float32), attention(b, q))
        for b in (batch, dataclasses.replace(batch, cache=cache))
    )
    sees = np.zeros(before[1].shape, bool)
    sees[1, 1, :group] = True  # the last query, of the first KV head
    for i in (0, 1):
        assert np.isnan(after[i][sees]).all() and not np.isnan(before[i]).any()
        assert np.array_equal(after[i][~sees], before[i][~sees])
    for a, b in zip(*(jax.tree.leaves(x[2]) for x in (after, before)), strict=True):
        assert np.isfinite(a).all() and np.array_equal(a[0], b[0])
        assert np.array_equal(a[1, 1], b[1, 1]) and not np.array_equal(a[1, 0], b[1, 0])


@both
def test_nan_is_handed_on():
    options = {"return_mass": True, "implementation": IMPLEMENTATION}
    check_nan(lambda batch, q: _attend(q, batch.cache, 1, batch.table(), **options))


@both
@pytest.mark.parametrize("length", [2500, pytest.param(9000, marks=pytest.mark.slow)])
def test_long_sequences(length):
    batch = make_batch(dataclasses.replace(CONFIG, ratio=0.25), [length, 30, 700])
    ones, window = [1, 1, 1], length - 700
    q, result, scale = run(batch, queries=1, query_lengths=ones, window=window)
    judged = {"layer": 1, "query_lengths": ones, "scale": scale}
    assert judge(batch, q, result, **judged, window=window) <= TOLERANCE
    assert judge(batch, q, result, **judged, window=window - 100) > 10 * TOLERANCE


def test_a_sequence_has_the_same_bits_alone():
    """Of the kernel in C++, in parts as well: with a table as wide as it needs."""
    batch = make_batch(CONFIG, [30, 2500, 700])
    table = batch.table()
    q = jax.random.normal(jax.random.key(3), (3, 1, 4, 64))
    options = {"return_mass": True, "implementation": "cpu"}
    together = _attend(q, batch.cache, 1, table, **options)
    for row in range(3):
        count = max(int(table.sealed_count[row]), 1)
        alone = jax.tree.map(lambda x, row=row: x[row : row + 1], table)
        sealed, index = alone.sealed[:, :count], alone.sealed_index[:, :count]
        alone = dataclasses.replace(alone, sealed=sealed, sealed_index=index)
        out, lse, mass = _attend(q[row : row + 1], batch.cache, 1, alone, **options)
        assert np.array_equal(out, together[0][row : row + 1])
        assert np.array_equal(lse, together[1][row : row + 1])
        assert np.array_equal(mass.sealed, together[2].sealed[row : row + 1, :, :count])
        assert np.array_equal(mass.raw, together[2].raw[row : row + 1])
    other = _attend(q[::-1], batch.cache, 1, table, **options)
    assert not np.array_equal(other[0][1], together[0][2])


def test_the_width_of_a_table_does_not_matter():
    """32 pages are in 16 parts, and 33 would be in 11."""
    batch = make_batch(CompressionConfig(page_size=256, window_tokens=0), [32 * 256 + 3, 700])
    table = batch.table()
    assert int(table.sealed_count[0]) == 32
    q = jax.random.normal(jax.random.key(3), (2, 1, 4, 64))
    results = []
    for columns in (32, 33, 48):
        wide = {
            name: np.pad(getattr(table, name)[:, :32], ((0, 0), (0, columns - 32)))
            for name in ("sealed", "sealed_index")
        }
        wider = dataclasses.replace(table, **wide)
        results.append(_attend(q, batch.cache, 1, wider, implementation="cpu"))
        scale = batch.cache.layout.head_dim**-0.5
        judged = {"layer": 1, "query_lengths": [1, 1], "scale": scale}
        # Logits are four times those of `run`.
        assert judge(batch, np.asarray(q), results[-1], **judged) <= 4 * TOLERANCE
    for result in results[1:]:
        assert np.array_equal(result[0], results[0][0])
        assert np.array_equal(result[1], results[0][1])


def test_order_of_pages_does_not_matter():
    batch = make_batch(CONFIG, [200])
    table = batch.table()
    n = int(table.sealed_count[0])
    backwards = dataclasses.replace(
        table,
        sealed=np.r_["1", table.sealed[:, :n][:, ::-1], table.sealed[:, n:]],
        sealed_index=np.r_["1", table.sealed_index[:, :n][:, ::-1], table.sealed_index[:, n:]],
    )
    q = jax.random.normal(jax.random.key(0), (1, 1, 2, 64))
    a, _, _ = _attend(q, batch.cache, 0, table)
    b, _, _ = _attend(q, batch.cache, 0, backwards)
    assert np.abs(np.asarray(a - b)).max() <= TOLERANCE


def test_memory_is_bounded():
    """No copy of the decoded cache, nor of any pool, exists while attending."""
    layout = CompressionConfig().layout(layers=2, kv_heads=8, head_dim=128, dtype="bfloat16")
    batch, columns = 4, 512  # 32k tokens a sequence
    sizes = PoolSizes(raw_pages=16, sealed_pages=2048, fine_chunks=4096, sink_slots=4)
    cache = jax.eval_shape(lambda: init_cache(layout, sizes))
    i32 = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.int32)  # noqa: E731
    table = make_batch(CONFIG, [1]).table()
    table = dataclasses.replace(
        table,
        **{f: i32(batch, columns) for f in ("sealed", "sealed_index")},
        **{f: i32(batch, 4) for f in ("raw", "raw_index")},
        **{f: i32(batch) for f in ("sealed_count", "raw_count", "sink", "length")},
    )
    for queries, mass in ((1, True), (64, False)):
        q = jax.ShapeDtypeStruct((batch, queries, 32, 128), jnp.bfloat16)
        compiled = _attend.lower(q, cache, i32(), table, return_mass=mass).compile()
        temporary = compiled.memory_analysis().temp_size_in_bytes
        decoded = batch * columns * layout.page_size * 2 * 8 * 128 * 4  # float32, one layer
        assert temporary < decoded / 8, (queries, temporary, decoded)
        assert temporary < 200e6, (queries, temporary)

    def whole(q, cache: PagedCache, layer, table):  # what must not happen is seen when it does
        from kvcompress_jax.paged import decode_pages

        keys, values = decode_pages(cache, layer, table.sealed)
        return jnp.einsum("bqhd,bphtd->bqhpt", q[:, :, ::4].astype(jnp.float32), keys), values

    q = jax.ShapeDtypeStruct((batch, 1, 32, 128), jnp.bfloat16)
    analysis = jax.jit(whole).lower(q, cache, i32(), table).compile().memory_analysis()
    assert analysis.temp_size_in_bytes + analysis.output_size_in_bytes > decoded / 8


@pytest.mark.parametrize("queries", [64, 256, 512])
def test_a_chunk_of_a_prompt_needs_no_new_memory_on_a_cpu(queries):
    """Which the C library returns to the system from 32 MiB on, whoever asked for it."""
    layout = CompressionConfig().layout(layers=1, kv_heads=3, head_dim=64, dtype="bfloat16")
    sizes = PoolSizes(raw_pages=8, sealed_pages=32, fine_chunks=32, sink_slots=1)
    cache = jax.eval_shape(lambda: init_cache(layout, sizes))
    i32 = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.int32)  # noqa: E731
    table = dataclasses.replace(
        make_batch(CONFIG, [1]).table(),
        **{name: i32(1, 32) for name in ("sealed", "sealed_index")},
        **{name: i32(1, 8) for name in ("raw", "raw_index")},
    )
    q = jax.ShapeDtypeStruct((1, queries, 9, 64), jnp.bfloat16)

    def temporary(block_pages):
        attend = functools.partial(
            attend_xla,
            scale=0.1,
            window=None,
            soft_cap=None,
            return_mass=True,
            query_lengths=jnp.full((1,), queries, jnp.int32),
            block_pages=block_pages,
        )
        compiled = jax.jit(attend).lower(q, cache, i32(), table).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    assert temporary(None) < 32 << 20
    if queries > 64:
        assert temporary(32) > 32 << 20


@pytest.mark.parametrize(
    ("shape", "options", "message"),
    [
        ((1, 1, 3, 64), {}, r"q: expected \[sequences, queries, multiple of 2, 64\], got"),
        ((1, 1, 4, 32), {}, r"q: expected \[sequences, queries, multiple of 2, 64\], got"),
        ((2, 1, 4, 64), {}, r"table: expected 2 sequences \(rows of q\), got 1"),
        (
            (1, 1, 4, 64),
            {"implementation": "cuda"},
            r"implementation: expected one of \['cpu', 'mosaic_gpu', 'triton', 'xla'\]",
        ),
    ],
)
def test_errors(shape, options, message):
    batch = make_batch(CONFIG, [5])
    with pytest.raises(ValueError, match=message):
        _attend(jnp.zeros(shape), batch.cache, 0, batch.table(), **options)
