"""The README's claims, on the real model and on text that every Python has: prose and code."""

import asyncio.base_events
import inspect
import math

import pytest

from kvcompress_jax.config import CompressionConfig
from kvcompress_jax.lab.evaluate import Evaluator
from kvcompress_jax.lab.texts import load_text
from kvcompress_jax.models.load import load_model
from tests.models.smollm2 import smollm2_file

# name: most effective bits, most KL, least top-1 agreement
BOUNDS = {
    "safe": (8.7, 0.0003, 0.98),
    "balanced": (6.7, 0.0015, 0.97),
    "compact": (4.6, 0.006, 0.95),
}
FACTS = 16


def broken_bounds(recipe, evaluation):
    """What of a recipe's claim does not hold."""
    bits, kl, agreement = BOUNDS[recipe]
    # Facts are recalled or not: the noise of a difference of two shares.
    noise = 2 * math.sqrt(0.5 / FACTS)
    return [
        name
        for name, holds in (
            ("bits", evaluation.effective_bits <= bits),
            ("kl", evaluation.kl_mean <= kl),
            ("top1", evaluation.top1_agreement >= agreement),
            (
                "retrieval",
                evaluation.retrieval_accuracy >= evaluation.retrieval_accuracy_uncompressed - noise,
            ),
        )
        if not holds
    ]


@pytest.mark.parametrize("text", ["prose", "code"])
def test_recipes_keep_their_bounds(text):
    smollm2_file()
    source = load_text() if text == "prose" else inspect.getsource(asyncio.base_events)
    evaluator = Evaluator(load_model("smollm2"), source, continuation_tokens=192, facts=FACTS)
    for recipe in BOUNDS:
        evaluation = evaluator.evaluate(CompressionConfig.recipe(recipe))
        assert broken_bounds(recipe, evaluation) == []
        if recipe == "compact":  # the judge can say no
            assert "kl" in broken_bounds("safe", evaluation)
