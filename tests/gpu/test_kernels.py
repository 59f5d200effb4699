"""The kernels as a GPU runs them: what other tests interpret, compiled. Skipped without a GPU."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kvcompress_jax.config import CompressionConfig
from kvcompress_jax.kernels.decode_attention import cases as decode_cases
from kvcompress_jax.kernels.decode_attention.mosaic import attention_mosaic
from kvcompress_jax.kernels.decode_attention.triton import attention_triton
from kvcompress_jax.kernels.dispatch import FALLBACKS
from kvcompress_jax.lab.agreement import disagreement
from kvcompress_jax.models.dense import dense_forward
from kvcompress_jax.models.runner import make_runner
from kvcompress_jax.paged import attend, attention, seal
from kvcompress_jax.paged.seal import IMPLEMENTATIONS as SEAL_IMPLEMENTATIONS
from kvcompress_jax.paged.seal import seal_xla
from tests.kernels.test_attention import CASES, ROUNDING, check_kernels
from tests.models.tiny import CONFIGS, random_tokens, tiny_model
from tests.paged.batch import make_batch
from tests.paged.test_attention import judge
from tests.paged.test_seal_kernels import make_cache, make_feedback, work

pytestmark = pytest.mark.skipif(jax.default_backend() != "gpu", reason="there is no GPU")

# page size, dim, group, queries, dtype, ratio of refined tokens, options
SIZES = CASES | {
    "page64": (64, 128, 4, 1, "bfloat16", 0.5, {}),
    "page64-mixed": (64, 128, 4, 1, "bfloat16", 0.5, {"fine_bits": 4}),
    "seven-heads": (64, 128, 7, 1, "bfloat16", 0.25, {}),
    "page128-fine": (128, 128, 8, 1, "float16", 1.0, {}),
    "page64-window": (64, 256, 4, 1, "bfloat16", 0.5, {"window": 100}),
    "page256": (256, 64, 3, 1, "bfloat16", 0.5, {}),
    "chunk": (64, 128, 4, 96, "bfloat16", 0.5, {}),
}


@pytest.mark.parametrize("case", SIZES.values(), ids=SIZES)
def test_attention_is_that_of_float64(case):
    op = "prefill_attention" if case[2] * case[3] > 16 else "decode_attention"
    check_kernels(case, [functools.partial(attention_triton, op=op)], pages=9)


@pytest.mark.parametrize("size", decode_cases.MOSAIC_SIZES, ids=str)
def test_mosaic_attention_is_that_of_float64(size):
    page_size, dim, fine_rows, group, dtype, options = size
    options = {"fine_bits": 4} | ({"window": 100} if options == "window" else {})
    case = (page_size, dim, group, 1, dtype, fine_rows / page_size, options)
    try:
        check_kernels(case, [attention_mosaic], pages=9)
    except NotImplementedError as e:
        pytest.skip(str(e))


@pytest.mark.parametrize(
    "settings",
    [{}, {"fine_bits": 4}, {"seal_level": 2}, {"enabled": False}, {"levels": 2}],
    ids=str,
)
def test_attend_takes_the_kernel(settings):
    config = CompressionConfig(**({"page_size": 64, "window_tokens": 64} | settings))
    batch = make_batch(config, [1, 70, 203, 700], head_dim=128, dtype="bfloat16")
    before = FALLBACKS.total()
    for queries, lengths in ((1, [1] * 4), (40, [1, 40, 0, 33])):
        q = jax.random.normal(jax.random.key(1), (4, queries, 8, 128), jnp.bfloat16)
        scale = 128**-0.5 / 4
        run = jax.jit(functools.partial(attend, scale=scale, return_mass=True))
        result = run(q, batch.cache, 1, batch.table(), query_lengths=jnp.array(lengths, jnp.int32))
        judged = {"layer": 1, "query_lengths": lengths, "scale": scale}
        assert judge(batch, q, result, **judged) <= ROUNDING["bfloat16"]
        assert judge(batch, q, result, **(judged | {"layer": 0})) > 2 * ROUNDING["bfloat16"]
    assert FALLBACKS.total() == before


@pytest.mark.parametrize("change", [{}, {"fine_rows": 0}, {"fine_bits": 2}], ids=str)
def test_sealing_is_that_of_xla(change):
    cache, shadow = make_cache(**change), None
    if not change:
        cache, shadow = make_cache(shadow_pages=2), jnp.array([1, -1, 0, -1], jnp.int32)
    before = FALLBACKS.total()
    got, want = jax.jit(seal)(cache, work(shadow)), jax.jit(seal_xla)(cache, work(shadow))
    assert FALLBACKS.total() == before
    assert np.array_equal(got.sealed, [True, True, False, True, True])
    assert int(got.rejected) == 1
    written = jnp.array([1, 3])
    for field in ("base", "order"):
        a, b = (getattr(x, field)[:, written] for x in (got, want))
        assert disagreement(a, b) is None, field
    assert disagreement(got.base[:, written[::-1]], want.base[:, written]) is not None
    for field in ("key_scale", "value_scale"):
        a, b = getattr(got, field), getattr(want, field)
        assert disagreement(a.step[:, written], b.step[:, written]) is None, field
        assert disagreement(a.zero[:, written], b.zero[:, written]) is None, field


@pytest.mark.parametrize("fine_bits", [4, 2])
def test_sealing_with_feedback_is_that_of_xla_but_for_last_bits(fine_bits):
    cache = make_cache(feedback=make_feedback(), fine_bits=fine_bits)
    got, want = jax.jit(seal)(cache, work()), jax.jit(seal_xla)(cache, work())
    plain = jax.jit(seal_xla)(dataclasses.replace(cache, feedback=None), work())
    written = jnp.array([1, 3])
    keys, values = ([np.asarray(x.base[:, written, i]) for x in (got, want, plain)] for i in (0, 1))
    assert np.array_equal(values[0], values[1])
    assert np.mean(keys[0] != keys[1]) < 0.01
    assert np.mean(keys[0] != keys[2]) > 0.02


def test_a_decoder_gives_what_it_gives_without_kernels(monkeypatch):
    """Prefill in chunks, pages of all levels; the judge sees other tokens' logits."""
    model = tiny_model(CONFIGS["qwen3"])
    tokens = random_tokens(model.config, 400, seed=2)
    config = CompressionConfig(page_size=64, window_tokens=64)

    def logits():
        runner = make_runner(
            model, config, tokens=512, max_sequences=1, chunk_tokens=50, kv_dtype="bfloat16"
        )
        got = np.asarray(runner.extend(runner.manager.add(), tokens, all_logits=True))
        runner.manager.verify(runner.cache)
        assert runner.manager.get_compression_stats()["seals"] >= 4
        return got

    before = FALLBACKS.total()
    with_kernels = logits()
    assert FALLBACKS.total() == before
    for implementations in (attention.IMPLEMENTATIONS, SEAL_IMPLEMENTATIONS):
        for name in set(implementations) - {"xla"}:
            monkeypatch.delitem(implementations, name)
    jax.clear_caches()
    without = logits()
    exact = np.asarray(dense_forward(model.params, model.config, jnp.asarray([tokens]))[0])
    size = np.abs(exact).mean()
    assert np.abs(with_kernels - without).mean() <= 2.0**-6 * size
    assert np.abs(with_kernels - exact).mean() <= 0.05 * size
    assert np.abs(with_kernels[1:] - without[:-1]).mean() > 0.5 * size
