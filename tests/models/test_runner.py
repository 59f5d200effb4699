"""The paged path against a dense float32 forward pass."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kvcompress_jax.config import CompressionConfig
from kvcompress_jax.manager import OutOfPagesError, device
from kvcompress_jax.models.dense import dense_forward
from kvcompress_jax.models.runner import make_runner
from kvcompress_jax.models.step import run_step
from kvcompress_jax.paged.raw_bits import bits
from tests.models.tiny import CONFIGS, random_tokens, tiny_model
from tests.paged.test_level_order import sorts

LOGIT_TOLERANCE = 1e-3  # both are float32 sums of some thousand products; seen: 1e-5


def dense(model, tokens):
    return np.asarray(dense_forward(model.params, model.config, jnp.array([tokens], jnp.int32))[0])


def uncompressed(page_size):
    return CompressionConfig(enabled=False, page_size=page_size)


def runner_of(model, config, *, max_sequences=1, tokens=512, chunk_tokens=32, kv_dtype="float32"):
    return make_runner(
        model,
        config,
        tokens=tokens,
        max_sequences=max_sequences,
        chunk_tokens=chunk_tokens,
        kv_dtype=kv_dtype,
    )


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize(
    ("page_size", "chunk"), [(16, 1), (16, 7), (16, 64), (32, 33), (64, 32), (128, 5), (256, 100)]
)
def test_chunked_prefill_is_the_dense_pass(name, page_size, chunk):
    if page_size in (32, 128) and name not in ("llama", "gemma3"):
        pytest.skip("one plain and one windowed architecture cover these page sizes")
    model = tiny_model(CONFIGS[name])
    tokens = random_tokens(model.config, 100, seed=1)
    if chunk == 1:
        tokens = tokens[:40]
    runner = runner_of(model, uncompressed(page_size), chunk_tokens=chunk)
    got = np.asarray(runner.extend(runner.manager.add(), tokens, all_logits=True))
    want = dense(model, tokens)
    assert np.abs(got - want).max() <= LOGIT_TOLERANCE
    assert np.array_equal(got.argmax(-1), want.argmax(-1))
    assert np.abs(got[1:] - want[:-1]).max() > 100 * LOGIT_TOLERANCE


@pytest.mark.parametrize(
    "name",
    [
        "llama",
        "gemma3",
        pytest.param("qwen2", marks=pytest.mark.slow),
        pytest.param("qwen3", marks=pytest.mark.slow),
    ],
)
def test_mixed_batches_of_ragged_lengths(name):
    """Eight sequences, one of them still reading its prompt while the others decode."""
    model = tiny_model(CONFIGS[name])
    runner = runner_of(model, uncompressed(16), max_sequences=8, tokens=800)
    texts = [random_tokens(model.config, n, seed=n) for n in (3, 16, 17, 40, 64, 5, 33, 90)]
    ids = [runner.manager.add() for _ in texts]
    fed = [len(t) - 3 for t in texts[:-1]] + [0]
    for sequence, text, n in zip(ids, texts, fed, strict=True):
        if n > 0:
            runner.extend(sequence, text[:n])
    for step in range(3):
        decoding = [i for i in range(7) if fed[i] >= 0]
        chunk = texts[7][fed[7] : fed[7] + 30]
        decoded, last = runner.forward(
            [(ids[i], texts[i][fed[i]]) for i in decoding], (ids[7], chunk)
        )
        for row, i in enumerate(decoding):
            fed[i] += 1
            want = dense(model, texts[i][: fed[i]])[-1]
            assert np.abs(decoded[row] - want).max() <= LOGIT_TOLERANCE, (step, i)
        fed[7] += len(chunk)
        want = dense(model, texts[7][: fed[7]])
        assert np.abs(last[0] - want[-1]).max() <= LOGIT_TOLERANCE
        assert np.abs(last[0] - want[-2]).max() > 100 * LOGIT_TOLERANCE


def test_a_step_that_does_not_fit_changes_nothing():
    model = tiny_model(CONFIGS["llama"])
    runner = runner_of(model, uncompressed(16), tokens=32, max_sequences=2)
    first, second = runner.manager.add(), runner.manager.add()
    runner.extend(first, random_tokens(model.config, 32, seed=0))
    runner.extend(second, random_tokens(model.config, 32, seed=1))
    before = runner.manager.raw.free
    with pytest.raises(OutOfPagesError, match="raw pages: expected 3 free, got 2"):
        runner.forward([(first, 1)], (second, [1] * 32))
    assert runner.manager.raw.free == before
    assert runner.manager.length(first) == runner.manager.length(second) == 32
    runner.manager.verify(runner.cache)


@pytest.mark.parametrize(
    ("decoding", "prefilling", "message"),
    [
        ([], None, "forward: expected at least one token"),
        ([], (0, [1] * 33), "at most 32 tokens, got 33"),
    ],
)
def test_errors(decoding, prefilling, message):
    model = tiny_model(CONFIGS["llama"])
    runner = runner_of(model, uncompressed(16))
    runner.manager.add()
    with pytest.raises(ValueError, match=message):
        runner.forward(decoding, prefilling)


@pytest.mark.parametrize("name", CONFIGS)
def test_compressed_logits_stay_near(name):
    """Not the fidelity of a real model, but no page is mixed up either: INT8 everywhere is close,
    INT4 is further, and both are nothing like another text's logits."""
    model = tiny_model(CONFIGS[name])
    tokens = random_tokens(model.config, 160, seed=2)
    want = dense(model, tokens)
    error = {}
    for levels, seal_level in ((2, 1), (3, 2)):
        config = CompressionConfig(
            page_size=16, window_tokens=16, levels=levels, seal_level=seal_level
        )
        runner = runner_of(model, config)
        got = np.asarray(runner.extend(runner.manager.add(), tokens, all_logits=True))
        stats = runner.manager.get_compression_stats()
        assert stats["seals"] >= 5
        error[levels] = np.abs(got - want).mean() / np.abs(want).mean()
    assert error[2] < 0.02
    assert error[2] < error[3] / 4
    assert error[3] < 0.3
    other = dense(model, random_tokens(model.config, 160, seed=3))
    assert np.abs(other - want).mean() / np.abs(want).mean() > 0.5


@pytest.mark.parametrize("kv_dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("enabled", [True, False])
def test_a_step_and_a_plan_work_in_place(monkeypatch, kv_dtype, enabled):
    """Neither holds a second copy of any pool."""
    config = CompressionConfig(enabled=enabled)
    runner = runner_of(tiny_model(CONFIGS["llama"]), config, tokens=200_000, kv_dtype=kv_dtype)
    calls = []

    def spy(function):
        def call(*args, **options):
            calls.append(function.lower(*args, **options).compile().memory_analysis())
            return function(*args, **options)

        return call

    monkeypatch.setattr("kvcompress_jax.models.runner.run_step", spy(run_step))
    monkeypatch.setattr(
        "kvcompress_jax.manager.device.apply_plan_in_place", spy(device.apply_plan_in_place)
    )
    runner.extend(runner.manager.add(), [1] * 224)
    pools = sum(x.nbytes for x in jax.tree.leaves(runner.cache))
    assert len(calls) == 7 + 2 * enabled  # steps, and plans that seal
    # On a CPU, JAX before 0.12 holds the raw pages of bfloat16 as integers in between.
    held = 0 if bits(runner.cache.raw) is runner.cache.raw else runner.cache.raw.nbytes
    for analysis in calls:
        assert analysis.alias_size_in_bytes >= pools
        assert analysis.temp_size_in_bytes < held + pools / 8
    # The same judge sees a step that is not in place.
    copied = jax.jit(lambda cache: jax.tree.map(jnp.copy, cache)).lower(runner.cache).compile()
    assert copied.memory_analysis().alias_size_in_bytes < pools


def test_a_step_sorts_pages_by_level_once(monkeypatch):
    """As it is traced where there is a GPU: once for the sequence that decodes, once for the one
    that reads its prompt, and not in every layer."""
    config = CompressionConfig(page_size=64, window_tokens=0)
    model = tiny_model(CONFIGS["qwen3"])
    runner = runner_of(model, config, max_sequences=2, kv_dtype="bfloat16")
    found = []

    def spy(*args, **options):
        with monkeypatch.context() as patch:
            patch.setattr(jax, "default_backend", lambda: "gpu")
            step = functools.partial(run_step.__wrapped__, **options)
            found.append(sorts(jax.make_jaxpr(step)(*args).jaxpr))
        return run_step(*args, **options)

    first, second = runner.manager.add(), runner.manager.add()
    for sequence in (first, second):
        runner.extend(sequence, [1] * 64)
    monkeypatch.setattr("kvcompress_jax.models.runner.run_step", spy)
    runner.forward([(first, 1)], (second, [1] * 20))
    monkeypatch.setattr("kvcompress_jax.models.step.order_by_level", lambda _, table: table)
    runner.forward([(first, 1)], (second, [1] * 20))
    assert found == [(2, 0), (2, 2)]  # the judge sees a step that does not sort ahead
