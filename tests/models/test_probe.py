"""Error feedback in the engine: what a model is probed for, and what it is worth."""

import argparse
import dataclasses
import logging
from pathlib import Path

import jax
import numpy as np
import pytest

from kvcompress_jax.config import RECIPES, CompressionConfig
from kvcompress_jax.lab.bench import Bench
from kvcompress_jax.lab.methods.embedded import Embedded
from kvcompress_jax.models.probe import probe_feedback
from kvcompress_jax.models.runner import make_runner
from tests.models.tiny import CONFIGS, tiny_model


@pytest.mark.parametrize("name", ["qwen2", "gemma3"])
def test_a_model_is_probed_once_and_always_alike(name, caplog):
    model = tiny_model(CONFIGS[name])
    with caplog.at_level(logging.WARNING):
        feedback = model.key_feedback
    assert "error feedback: no text that this model reads" in caplog.text
    assert model.key_feedback is feedback
    again = probe_feedback(model.params, model.config, None)
    for a, b in zip(jax.tree.leaves(feedback), jax.tree.leaves(again), strict=True):
        assert np.isfinite(a).all()
        assert np.array_equal(a, b)
    other = tiny_model(CONFIGS[name], seed=1).key_feedback
    assert not np.array_equal(feedback.carry, other.carry)
    config = model.config
    shape = (config.num_layers, config.num_kv_heads, 2, config.head_dim // 2)
    assert feedback.carry.shape[:4] == shape


def test_runners_have_it_where_keys_have_4_bits():
    model = tiny_model(CONFIGS["llama"])

    def feedback(**changes):
        config = CompressionConfig(page_size=16, window_tokens=16, **changes)
        return make_runner(model, config, tokens=64, max_sequences=1).cache.feedback

    found = feedback()
    assert np.array_equal(found.answer, model.key_feedback.answer)
    assert feedback(seal_level=2) is not None
    for changes in ({"error_feedback": False}, {"levels": 2}, {"enabled": False}):
        assert feedback(**changes) is None


@pytest.mark.slow
def test_it_lowers_the_divergence_of_a_real_model(smollm2):
    """Of 4-bit pages, on another text than it was probed with; feedback for the heads of other
    layers does not."""
    bench = Bench(smollm2, Path(argparse.__file__).read_text(encoding="utf-8"), facts=0)
    config = RECIPES["compact"]
    nearest = bench.measure(Embedded(config=dataclasses.replace(config, error_feedback=False)))
    fed = bench.measure(Embedded(config=config))
    assert fed.bits == nearest.bits
    assert fed.kl_mean < 0.8 * nearest.kl_mean
    feedback = bench.context.feedback
    shifted = dataclasses.replace(
        feedback,
        carry=np.roll(feedback.carry, 7, axis=0),
        answer=np.roll(feedback.answer, 7, axis=0),
    )
    bench.context = dataclasses.replace(bench.context, feedback=shifted)
    assert bench.measure(Embedded(config=config)).kl_mean > 0.8 * nearest.kl_mean
