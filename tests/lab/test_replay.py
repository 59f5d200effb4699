"""Replay against the dense forward pass, the real paged cache, and answers given one by one."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from kvcompress_jax.config import RECIPES, CompressionConfig
from kvcompress_jax.lab.bench import Bench, Recall, compress
from kvcompress_jax.lab.evaluate import Evaluator
from kvcompress_jax.lab.methods.base import Uncompressed
from kvcompress_jax.lab.methods.embedded import Embedded
from kvcompress_jax.lab.replay import capture, replay
from kvcompress_jax.lab.retrieval import plant_facts, retrieval_accuracy
from kvcompress_jax.lab.texts import load_text
from kvcompress_jax.models.dense import dense_forward
from kvcompress_jax.models.load import load_model
from kvcompress_jax.models.runner import make_runner
from tests.lab.small import TEXT, write_small_model
from tests.models.smollm2 import smollm2_file
from tests.models.tiny import CONFIGS, random_tokens, tiny_model

CONTEXT, CONTINUATION = 80, 12


def continued(model, context, rows, method=None):
    compressed = compress(method or Uncompressed(), context)
    return replay(
        model.params,
        compressed,
        jnp.asarray(rows, jnp.int32),
        config=model.config,
        kv_dtype=context.kv_dtype,
    )


@pytest.mark.parametrize("name", CONFIGS)
def test_uncompressed_replay_is_the_dense_forward_pass(name):
    """With windows, grouped queries, biases and norms; two rows at once, each on its own."""
    config = dataclasses.replace(CONFIGS[name], soft_cap=30.0 if name == "qwen2" else None)
    model = tiny_model(config)
    tokens = random_tokens(config, CONTEXT + CONTINUATION, 0)
    other = random_tokens(config, CONTINUATION, 1)
    rows = [tokens[CONTEXT:], other]
    context = capture(model, tokens[:CONTEXT], kv_dtype="float32")
    found = continued(model, context, rows)
    for row, logits in zip(rows, found, strict=True):
        whole = dense_forward(
            model.params, config, jnp.asarray([tokens[:CONTEXT] + row], jnp.int32)
        )[0, CONTEXT:]
        # Float32 sums in another order; logits are about 1.
        np.testing.assert_allclose(logits, whole, atol=2e-5)
        wrong = dataclasses.replace(context, k=context.k.at[:, 70].mul(1.5))
        assert np.abs(continued(model, wrong, rows)[0] - whole).max() > 1e-3


def test_dropped_tokens_are_not_seen():
    """keep=False and a huge key: nobody looks at it; keep=True: everybody does."""
    model = tiny_model(CONFIGS["gemma3"])
    tokens = random_tokens(model.config, CONTEXT + CONTINUATION, 0)
    context = capture(model, tokens[:CONTEXT], kv_dtype="float32")
    compressed = compress(Uncompressed(), context)
    layers, count, heads, _ = compressed.keys.shape
    keep = jnp.ones((layers, heads, count), bool).at[:, :, 75].set(False)
    poisoned = dataclasses.replace(compressed, values=compressed.values.at[:, 75].set(1e3))

    def run(compressed):
        rows = jnp.asarray([tokens[CONTEXT:]], jnp.int32)
        return replay(model.params, compressed, rows, config=model.config, kv_dtype="float32")

    dropped = run(dataclasses.replace(compressed, keep=keep))
    np.testing.assert_allclose(run(dataclasses.replace(poisoned, keep=keep)), dropped, atol=1e-6)
    assert np.abs(run(poisoned) - dropped).max() > 0.1


def test_context_refuses_more_exact_tokens_than_there_are():
    model = tiny_model(CONFIGS["llama"])
    with pytest.raises(
        ValueError, match="sinks and window: expected none negative and less than 8"
    ):
        capture(model, list(range(8)), sinks=4, window=4)


@pytest.mark.parametrize("recipe", RECIPES)
def test_our_recipes_replay_as_the_paged_cache(recipe, tmp_path):
    """Bytes to the last one, and logits. No page is due during the continuation."""
    model = load_model(write_small_model(tmp_path / "tiny", "qwen2"))
    config = dataclasses.replace(RECIPES[recipe], page_size=32, window_tokens=32)
    sizes = {"context_tokens": 256, "continuation_tokens": 24, "kv_dtype": "float32", "facts": 0}
    evaluator = Evaluator(model, TEXT, **sizes)
    bench = Bench(model, TEXT, window=32, **sizes)
    runner, sequence = evaluator._read(config, evaluator.context)
    stats = runner.manager.get_compression_stats()
    paged = evaluator._continue(runner, sequence)
    compressed = compress(Embedded(config=config), bench.context)
    assert compressed.stored_bits == 8 * stats["allocated_bytes"]
    replayed = bench._continue(compressed)
    plain = bench.reference
    error = float(jnp.linalg.norm(replayed - paged))
    effect = float(jnp.linalg.norm(paged - plain))
    # In float32 both run the same code on the same numbers but for the order of sums, which can
    # move a value over the edge of a cell: one in some thousands, one step each.
    assert error < 0.05 * effect
    other = compress(
        Embedded(config=RECIPES["extreme" if recipe != "extreme" else "safe"]), bench.context
    )
    assert float(jnp.linalg.norm(bench._continue(other) - paged)) > 0.3 * effect


def test_retrieval_agrees_with_answers_on_the_paged_cache():
    """The real model: every fact alike, with all questions in one batch or one after the other."""
    smollm2_file()
    model = load_model("smollm2")
    text = model.tokenizer.encode(load_text(), add_special=True)
    facts = plant_facts(model.tokenizer, text, context_tokens=512, facts=8)
    recall = Recall(model, facts, capture(model, facts.context))
    found = recall.measure(compress(Uncompressed(), recall.context))
    runner = make_runner(
        model, CompressionConfig(enabled=False), tokens=1024, max_sequences=2, chunk_tokens=512
    )
    sequence = runner.manager.add()
    runner.extend(sequence, facts.context)
    runner.chunk_tokens = 16
    assert np.mean(found) == retrieval_accuracy(runner, sequence, facts)
    assert any(found)
    blind = dataclasses.replace(
        compress(Uncompressed(), recall.context),
        keep=jnp.zeros((model.config.num_layers, model.config.num_kv_heads, 512), bool)
        .at[:, :, :4]
        .set(True),
    )
    assert not any(recall.measure(blind))
