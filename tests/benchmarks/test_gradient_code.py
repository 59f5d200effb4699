"""Gradients through the calibrated code: the same code, and a way down."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks.gradient_code import (
    Setting,
    divergence_of,
    loss_and_gradient,
    no_change,
    prepare,
    through_code,
    train,
)
from kvcompress_jax.calibrated.calibrate import calibrate, gather
from kvcompress_jax.calibrated.pages import received_attention, there_and_back
from kvcompress_jax.models.dense import capture_forward
from kvcompress_jax.models.rope import layer_frequencies
from tests.models.tiny import CONFIGS, random_tokens, tiny_model

MODEL = tiny_model(CONFIGS["llama"])


@pytest.fixture(scope="module")
def scene():
    samples = [random_tokens(MODEL.config, 128, seed=i) for i in range(2)]
    statistics = gather(MODEL, samples, page_size=16)
    profile = calibrate(MODEL, statistics, bits=3.5)
    setting = Setting(profile.rows, MODEL.config, 16, statistics.sink_tokens)
    code = profile.code(layer_frequencies(MODEL.config))
    tokens = jnp.asarray(samples[0], jnp.int32)
    _, seen = capture_forward(MODEL.params, MODEL.config, tokens[None])
    return tokens, seen, code, setting, prepare(tokens, seen, code, setting)


def test_what_is_trained_is_what_is_stored(scene):
    _, seen, code, setting, sample = scene
    past = sample.keys.shape[1]
    q, k, v = (x[1, 0, :past].astype(jnp.float32) for x in (seen.q, seen.k, seen.v))
    received = received_attention(q, k, setting.config, jnp.int32(1))
    stored, _ = there_and_back(k, v, received, code.at(1), setting.rows, 16, setting.sink_tokens)
    again = through_code(sample.keys[1], sample.exact[1], no_change(code).of(code).at(1))
    rows = ~np.asarray(sample.exact[1])
    assert 0 < (~rows).mean() < 0.5
    size = float(jnp.abs(k).max())
    assert np.abs(np.asarray(again - stored))[rows].max() <= 1e-4 * size
    assert np.abs(np.asarray(again - k))[rows].max() > 1e-2 * size  # it went through the code
    assert np.array_equal(np.asarray(again)[~rows], np.asarray(k)[~rows])


def test_training_lowers_what_it_trains_on(scene):
    tokens, seen, code, setting, sample = scene
    loss, gradient = loss_and_gradient(no_change(code), MODEL.params, sample, code, setting)
    # The reference's refined keys have 8 bits where these are exact.
    assert float(loss) == pytest.approx(
        divergence_of(MODEL.params, tokens, seen, code, setting), rel=0.1
    )
    for part in jax.tree.leaves(gradient):
        assert np.isfinite(part).all() and np.abs(part).max() > 0
    steps = train(
        MODEL.params, [sample], code, setting, epochs=12, learning_rate=3e-2, learn=["step"]
    )
    losses, codes = zip(*steps, strict=True)
    assert losses[0] == pytest.approx(float(loss))
    assert losses[-1] < 0.97 * losses[0]
    assert np.array_equal(codes[-1].mean, code.mean)
    assert not np.array_equal(codes[-1].step, code.step)
    worse = dataclasses.replace(code, step=2 * code.step)
    doubled, _ = loss_and_gradient(no_change(code), MODEL.params, sample, worse, setting)
    assert float(doubled) > 1.5 * float(loss)
