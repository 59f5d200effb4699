"""What was read once is put into a cache as if that cache's own runner had read it."""

import dataclasses

import jax
import numpy as np
import pytest

from kvcompress_jax.config import RECIPES
from kvcompress_jax.lab.prefill import observing, put_prefill, take_prefill
from kvcompress_jax.models.runner import make_runner
from tests.models.tiny import CONFIGS, random_tokens, tiny_model

TOKENS = 150


def runner_of(model, config):
    return make_runner(
        model, config, tokens=2 * TOKENS, max_sequences=1, chunk_tokens=TOKENS, kv_dtype="bfloat16"
    )


@pytest.fixture(scope="module")
def model():
    return tiny_model(CONFIGS["qwen2"])


@pytest.fixture(scope="module")
def prefill(model):
    runner = runner_of(model, observing(TOKENS))
    sequence = runner.manager.add()
    runner.extend(sequence, random_tokens(model.config, TOKENS, seed=3))
    runner.advance()
    assert runner.manager.get_compression_stats()["pages_level_0"] == -(-TOKENS // 64)
    return take_prefill(runner, sequence)


@pytest.mark.parametrize(("recipe", "page_size"), [("balanced", 16), ("compact", 64)])
def test_the_cache_is_that_of_a_runner_that_read_it(model, prefill, recipe, page_size):
    config = dataclasses.replace(RECIPES[recipe], page_size=page_size, window_tokens=page_size)
    read = runner_of(model, config)
    read.extend(read.manager.add(), random_tokens(model.config, TOKENS, seed=3))
    read.advance()
    put = runner_of(model, config)
    put_prefill(put, prefill)
    put.advance()
    put.manager.verify(put.cache)
    assert put.manager.get_compression_stats() == read.manager.get_compression_stats()
    same = jax.tree.map(lambda a, b: bool(np.array_equal(a, b)), put.cache, read.cache)
    assert all(jax.tree.leaves(same))


def test_attention_comes_along(model, prefill):
    """The judge can say no: without it, other tokens are refined."""
    config = dataclasses.replace(RECIPES["mixed"], page_size=16, window_tokens=16)
    orders = []
    for mass in (prefill.mass, prefill.mass[:, ::-1]):
        runner = runner_of(model, config)
        put_prefill(runner, dataclasses.replace(prefill, mass=mass))
        runner.advance()
        orders.append(np.asarray(runner.cache.order))
    assert not np.array_equal(*orders)
