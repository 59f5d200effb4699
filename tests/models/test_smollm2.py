"""The real SmolLM2 from its GGUF file, alone and against Hugging Face transformers."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kvcompress_jax.models.config import Rope
from kvcompress_jax.models.dense import dense_forward
from tests.models.greedy import greedy, greedy_follows

PROMPT = (
    "The library of Alexandria was one of the largest libraries of the ancient world. "
    "Scholars came from all over the Mediterranean to read its scrolls, and"
)
# The contract. Logits reach 40 here, where a float32 ulp is 4e-6; 30 layers of rounding give 1e-4.
TOLERANCE = 1e-3


def _tokens(model, text=PROMPT):
    return np.array([model.tokenizer.encode(text)], np.int32)


def test_continues_sensibly(smollm2):
    ids = smollm2.tokenizer.encode("The capital of France is")
    assert "Paris" in smollm2.tokenizer.decode(greedy(smollm2, ids, 8))


def test_answers_a_chat(smollm2):
    question = [{"role": "user", "content": "What is the capital of Japan? Answer in one word."}]
    ids = smollm2.tokenizer.encode(smollm2.tokenizer.chat(question))
    answer = greedy(smollm2, ids, 8)
    assert "Tokyo" in smollm2.tokenizer.decode(answer)
    assert set(answer) & set(smollm2.config.eos_token_ids), "the answer ends"


def test_text_is_likely(smollm2):
    """Permuted heads or a wrong theta would leave words, but not this likelihood."""

    def nll(model):
        tokens = _tokens(model)
        scores = jax.nn.log_softmax(dense_forward(model.params, model.config, jnp.asarray(tokens)))
        return -float(np.take_along_axis(scores[0, :-1], tokens[0, 1:, None], axis=-1).mean())

    assert nll(smollm2) < 2.6
    wrong = dataclasses.replace(smollm2.config, rope=Rope(theta=1000.0))
    assert nll(dataclasses.replace(smollm2, config=wrong)) > 2.6


@pytest.mark.first
def test_logits_and_greedy_tokens(smollm2):
    from tests.models import hf

    reference = hf.load_smollm2()
    tokens = _tokens(smollm2)
    expected = hf.hf_logits(reference, tokens)
    assert np.abs(hf.our_logits(smollm2, tokens) - expected).max() <= TOLERANCE
    wrong = dataclasses.replace(smollm2.config, rope=Rope(theta=100_100.0))
    wrong = dataclasses.replace(smollm2, config=wrong)
    assert np.abs(hf.our_logits(wrong, tokens) - expected).max() > TOLERANCE
    prompt = tokens[0].tolist()
    chosen = hf.hf_greedy(reference, prompt, 32)
    assert greedy_follows(smollm2, prompt, chosen)
    assert not greedy_follows(smollm2, prompt, [*chosen[:-1], chosen[-1] + 1])
