"""Shadows of sealed pages, and what attention to them measures."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kvcompress_jax.config import CompressionConfig, ConfigError
from kvcompress_jax.manager.page import Page
from kvcompress_jax.manager.shadows import Shadows
from kvcompress_jax.models.runner import make_runner
from kvcompress_jax.models.step import run_step
from kvcompress_jax.paged import apply_plan
from tests.models.tiny import CONFIGS, random_tokens, tiny_model
from tests.paged.batch import reference_attention, reference_page

pytestmark = pytest.mark.slow

LENGTH = 150
CONFIG = CompressionConfig(page_size=16, window_tokens=16, telemetry_share=1.0, telemetry_pages=16)

# Float32 errors against float64: outputs of size 1 are right to about 1e-6, and an output error of
# about 0.01 is a difference of such outputs: to about 1e-4 of itself. Ten times that.
RELATIVE = 1e-3


def runner_of(config, name="llama", *, chunk=16, kv_dtype="float32", tokens=LENGTH):
    model = tiny_model(CONFIGS[name])
    runner = make_runner(
        model, config, tokens=512, max_sequences=2, chunk_tokens=chunk, kv_dtype=kv_dtype
    )
    sequence = runner.manager.add()
    runner.extend(sequence, random_tokens(model.config, tokens, seed=1))
    return runner, sequence


def stats(runner):
    return runner.manager.get_compression_stats()


def spoil(cache):
    """Another code: the base plane says 0 everywhere."""
    return dataclasses.replace(cache, base=jnp.zeros_like(cache.base))


def reference_errors(cache, layer, q, table, first_query, *, scale, window, soft_cap, raw):
    """Relative output errors [queries, heads] and log-sum-exp errors of one row, in float64: dense
    attention to the bytes of the cache, and to the same with raw pages. `raw` gives the keys and
    values [heads, page_size, dim] of a sealed page, or None."""
    size, sink = cache.layout.page_size, int(table.sink[0])
    position, coded, plain = [], ([], []), ([], [])
    for column in range(int(table.sealed_count[0])):
        page, index = int(table.sealed[0, column]), int(table.sealed_index[0, column])
        code = list(reference_page(cache, layer, page))
        if index == 0 and sink >= 0:
            exact = np.asarray(cache.sinks[layer, sink], np.float64)
            for x, e in zip(code, exact, strict=True):
                x[:, : e.shape[1]] = e
        position.append(index * size + np.arange(size))
        true = raw(page) or code
        for i in range(2):
            coded[i].append(code[i])
            plain[i].append(true[i])
    for column in range(int(table.raw_count[0])):
        first = int(table.raw_index[0, column]) * size
        kv = np.asarray(cache.raw[layer, int(table.raw[0, column])], np.float64)
        kv = kv[:, :, : int(table.length[0]) - first]
        position.append(first + np.arange(kv.shape[2]))
        for i in range(2):
            coded[i].append(kv[i])
            plain[i].append(kv[i])
    position = np.concatenate(position)
    outs = []
    for parts in (coded, plain):
        keys, values = (np.concatenate(x, axis=1).swapaxes(0, 1) for x in parts)
        outs.append(
            reference_attention(
                q,
                position,
                keys,
                values,
                first_query,
                scale=scale,
                window=window,
                soft_cap=soft_cap,
            )[:2]
        )
    (out, lse), (true, true_lse) = outs
    error = np.linalg.norm(out - true, axis=-1) / np.linalg.norm(true, axis=-1)
    return error, np.abs(lse - true_lse)


def measured_step(config, name, *, spoiled=False):
    """One decoding step after 150 tokens; the sums of a layer before and after it, the queries
    that it measured with, and all that the reference needs."""
    from kvcompress_jax.paged import append, attend
    from kvcompress_jax.paged.measure import measure

    runner, sequence = runner_of(dataclasses.replace(config, telemetry_share=1e-9), name)
    runner.advance()
    cache = spoil(runner.cache) if spoiled else runner.cache
    model = runner.model.config
    shadows = np.array([p.sealed if p else -1 for p in runner.manager.shadows._pages], np.int32)
    queries, layer = 3, 1
    random = np.random.default_rng(0)
    q = jnp.asarray(random.normal(size=(1, queries, model.num_heads, model.head_dim)), jnp.float32)
    kv = jnp.asarray(
        random.normal(size=(2, queries, model.num_kv_heads, model.head_dim)), jnp.float32
    )
    slots = runner.manager.append_slots(sequence, queries)
    cache = append(cache, layer, kv[0], kv[1], slots)
    table = runner.manager.table([sequence])
    window = model.layer_windows[0]  # the windowed one, if there is any
    options = dict(scale=model.query_scale, window=window or None, soft_cap=model.soft_cap)
    lengths = jnp.asarray([queries], jnp.int32)
    out, lse, _ = attend(q, cache, layer, table, query_lengths=lengths, **options)
    after = jax.jit(measure, static_argnames=("scale", "window", "soft_cap"))(
        cache, layer, q, table, shadows, out, lse, query_lengths=lengths, **options
    )
    sums = jax.tree.map(lambda x: float(x[layer]), after.telemetry.sums)

    def raw(page):
        slot = list(shadows).index(page) if page in shadows else None
        return None if slot is None else np.asarray(cache.telemetry.shadow[layer, slot], np.float64)

    want = reference_errors(
        cache,
        layer,
        q[0],
        table,
        int(table.length[0]) - queries,
        scale=model.query_scale,
        window=window,
        soft_cap=model.soft_cap,
        raw=lambda page: None if raw(page) is None else list(raw(page)),
    )
    return sums, want, table, shadows


@pytest.mark.parametrize("name", ["llama", "gemma3"])
@pytest.mark.parametrize("ratio", [0.25, 1.0])
def test_the_measured_error_is_the_error(name, ratio):
    """Exactly, with a shadow of every sealed page; windows and exact tokens included."""
    sums, (error, lse), table, shadows = measured_step(
        dataclasses.replace(CONFIG, ratio=ratio, window_tokens=0), name
    )
    sealed = set(table.sealed[0, : int(table.sealed_count[0])].tolist())
    assert sealed
    assert sealed <= set(shadows.tolist())
    assert sums.samples == error.size
    np.testing.assert_allclose(sums.output, error.sum(), rtol=RELATIVE, atol=1e-6)
    np.testing.assert_allclose(sums.output_squares, (error**2).sum(), rtol=2 * RELATIVE, atol=1e-8)
    np.testing.assert_allclose(sums.output_max, error.max(), rtol=RELATIVE, atol=1e-6)
    np.testing.assert_allclose(sums.lse, lse.sum(), rtol=RELATIVE, atol=1e-5)
    assert error.max() > 1e-3  # there is something to see
    assert abs(sums.output - 1.05 * error.sum()) > RELATIVE * error.sum()


def test_few_shadows_are_scaled_up():
    sums, (error, _), table, shadows = measured_step(
        dataclasses.replace(CONFIG, telemetry_pages=2), "llama"
    )
    sealed = int(table.sealed_count[0])
    assert (shadows >= 0).sum() == 2
    np.testing.assert_allclose(sums.output, error.sum() * (sealed / 2) ** 0.5, rtol=RELATIVE)


def test_a_bad_code_shows():
    good, _, _, _ = measured_step(CONFIG, "llama")
    bad, (error, _), _, _ = measured_step(CONFIG, "llama", spoiled=True)
    np.testing.assert_allclose(bad.output, error.sum(), rtol=RELATIVE)
    assert bad.output > 10 * good.output


def test_through_the_runner():
    """Sampled steps fill the statistics; a coarser code has more error; what is not compressed has
    none."""
    found = {}
    for name, config in {
        "all refined": dataclasses.replace(CONFIG, ratio=1.0),
        "half refined": CONFIG,
        "4 bits": dataclasses.replace(CONFIG, seal_level=2),
    }.items():
        runner, sequence = runner_of(config)
        found[name] = stats(runner)["telemetry_output_error_mean"]
        runner.manager.verify(runner.cache)
        assert stats(runner)["telemetry_samples"] > 0
        assert stats(runner)["telemetry_output_error_max"] >= found[name]
        errors = runner.manager.shadows.errors()
        assert len(errors.output_mean) == 3
        runner.manager.free(sequence)
        assert stats(runner)["telemetry_shadow_bytes"] == 0
    assert found["4 bits"] > found["half refined"] > 3 * found["all refined"] > 0

    runner, _ = runner_of(dataclasses.replace(CONFIG, enabled=False))
    assert runner.cache.telemetry is None
    assert stats(runner)["telemetry_samples"] == 0
    assert stats(runner)["telemetry_output_error_mean"] is None


def test_a_page_spoiled_during_generation_raises_the_error():
    runner, sequence = runner_of(CONFIG)
    runner.advance()
    before = stats(runner)
    runner.cache = spoil(runner.cache)
    runner.forward([(sequence, 1)])
    after = stats(runner)
    assert after["telemetry_samples"] > before["telemetry_samples"]
    assert after["telemetry_output_error_max"] > 10 * before["telemetry_output_error_mean"]


def test_measuring_changes_nothing_and_costs_nothing_when_off():
    outs, programs = [], []
    for share in (0.0, 1.0):
        runner, sequence = runner_of(dataclasses.replace(CONFIG, telemetry_share=share))
        run_step.clear_cache()
        outs.append(np.asarray(runner.forward([(sequence, 1)])[0]))
        plain = dataclasses.replace(runner.cache, telemetry=None)
        programs.append(plain)
        shadows = runner.cache.telemetry
        assert (shadows is None) == (share == 0)
    assert np.array_equal(*outs)
    for a, b in zip(*map(jax.tree.leaves, programs), strict=True):
        assert np.array_equal(np.asarray(a), np.asarray(b), equal_nan=True)


def test_programs_without_telemetry_are_the_same():
    """Plans and steps of a runner that does not measure have no trace of it."""
    runner, sequence = runner_of(CompressionConfig(page_size=16, window_tokens=16))
    assert runner.cache.sizes.shadow_pages == 0
    assert len(jax.tree.leaves(runner.cache)) == len(
        jax.tree.leaves(dataclasses.replace(runner.cache, telemetry=None, learned=None))
    )
    runner.manager.append_slots(sequence, 16)
    plan = runner.manager.plan()
    assert plan.seals.shadow is None
    text = jax.jit(apply_plan).lower(runner.cache, plan).as_text()
    measuring, sequence = runner_of(CONFIG)
    measuring.manager.append_slots(sequence, 16)
    plan = measuring.manager.plan()
    assert plan.seals.shadow is not None
    assert len(jax.jit(apply_plan).lower(measuring.cache, plan).as_text()) > len(text)


def test_the_same_steps_are_sampled_again():
    def run(share):
        runner, _ = runner_of(dataclasses.replace(CONFIG, telemetry_share=share, telemetry_pages=2))
        return runner.manager.shadows.errors()

    assert run(0.5) == run(0.5)
    assert 0 < sum(run(0.5).samples) < sum(run(1.0).samples)


def test_pages_in_use_have_the_same_chance():
    kept = np.zeros(40)
    for seed in range(400):
        shadows = Shadows(4, 1.0)
        shadows._random = np.random.default_rng(seed)
        for i in range(40):
            shadows.choose(Page(uid=i, index=i, sealed=i), i + 1)
        kept[shadows.sample()] += 1
    share = kept / 400  # each 0.1, with a deviation of 0.015
    assert np.abs(share[:20].mean() - 0.1) < 0.02
    assert np.abs(share[20:].mean() - 0.1) < 0.02
    assert share.max() < 0.1 + 5 * 0.015


def test_a_page_that_left_is_not_compared_with():
    shadows = Shadows(2, 1.0)
    first, second = Page(uid=0, index=0, sealed=5), Page(uid=1, index=1, sealed=6)
    assert [shadows.choose(first, 1), shadows.choose(second, 2)] == [0, 1]
    second.pending = True
    assert shadows.sample().tolist() == [5, -1]
    second.pending, first.sealed = False, -1
    assert shadows.sample().tolist() == [-1, 6]
    assert shadows.choose(Page(uid=2, index=2, sealed=7), 2) == 0  # the free slot
    second.sealed = 9  # preempted and back, elsewhere
    assert shadows.sample().tolist() == [7, 9]


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("telemetry_share", 1.5, "telemetry_share: expected 0 to 1, got 1.5"),
        ("telemetry_share", float("nan"), "telemetry_share: expected 0 to 1, got nan"),
        ("telemetry_pages", 0, "telemetry_pages: expected at least 1, got 0"),
    ],
)
def test_settings(field, value, message):
    with pytest.raises(ConfigError, match=message):
        CompressionConfig(**{field: value})


def test_environment():
    assert (
        CompressionConfig.from_env({"KVCOMPRESS_TELEMETRY_SHARE": "0.02"}).telemetry_share == 0.02
    )
    with pytest.raises(ConfigError, match=r"KVCOMPRESS_TELEMETRY_SHARE: expected 0 to 1, got 2\.0"):
        CompressionConfig.from_env({"KVCOMPRESS_TELEMETRY_SHARE": "2"})
