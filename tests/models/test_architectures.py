"""Every architecture against Hugging Face transformers, from safetensors and from GGUF."""

import dataclasses

import numpy as np
import pytest

from kvcompress_jax.models.config import Rope
from kvcompress_jax.models.load import Model, load_model
from tests.models import hf
from tests.models.files import write_gguf
from tests.models.greedy import greedy_follows

# Logits are of order 1 and sums have at most 512 terms over at most 7 layers: float32 rounding
# stays below 1e-5; the contract allows 1e-3.
TOLERANCE = 5e-5


@pytest.fixture(scope="module")
def oracle():
    """HF models by case, made once."""
    models = {}

    def get(case):
        if case not in models:
            models[case] = hf.make_hf(case)
        return models[case]

    return get


@pytest.fixture(scope="module")
def saved(oracle, tmp_path_factory):
    """(HF model, path) of a case in a format, written once."""
    paths = {}

    def get(case, kind):
        if (case, kind) not in paths:
            folder = tmp_path_factory.mktemp(case)
            paths[case, kind] = (
                write_gguf(*hf.contents(oracle(case)), folder / "model.gguf")
                if kind == "gguf"
                else hf.save(oracle(case), folder / "model")
            )
        return oracle(case), paths[case, kind]

    return get


def difference(reference, model: Model) -> float:
    tokens = hf.random_tokens(model.config.vocab_size)
    expected = hf.hf_logits(reference, tokens)
    assert expected.std() > 0.3, "logits that say nothing"
    return float(np.abs(hf.our_logits(model, tokens) - expected).max())


@pytest.mark.parametrize("kind", ["safetensors", "gguf"])
@pytest.mark.parametrize("case", hf.CASES)
def test_logits(case, kind, saved):
    if kind == "gguf" and case == "qwen2-window":
        pytest.skip("GGUF files of Qwen2 have no windows")
    reference, path = saved(case, kind)
    model = load_model(path)
    got = difference(reference, model)
    print(case, kind, got)
    assert got <= TOLERANCE


@pytest.mark.parametrize("case", ["llama", "qwen2-window", "qwen3", "gemma3-options"])
def test_greedy_tokens(case, saved):
    reference, path = saved(case, "safetensors")
    prompt = hf.random_tokens(160, tokens=16)[0].tolist()
    expected = hf.hf_greedy(reference, prompt, 24)
    assert len(set(expected)) > 2, "a text that repeats itself says nothing"
    assert greedy_follows(load_model(path), prompt, expected)


def _changed(model: Model, **changes) -> Model:
    return dataclasses.replace(model, config=dataclasses.replace(model.config, **changes))


WRONG = {
    "theta": ("llama", lambda m: _changed(m, rope=Rope(theta=m.config.rope.theta * 1.1))),
    "no llama3 scaling": ("llama3-scaling-tied", lambda m: _changed(m, rope=Rope(theta=5e5))),
    "query scale": ("qwen3", lambda m: _changed(m, query_scale=m.config.query_scale * 1.05)),
    "norm eps": ("qwen3", lambda m: _changed(m, norm_eps=1e-2)),
    "window one short": (
        "gemma3",
        lambda m: _changed(m, sliding_window=8, layer_windows=(8,) * 5 + (0, 8)),
    ),
    "window one long": (
        "gemma3",
        lambda m: _changed(m, sliding_window=10, layer_windows=(10,) * 5 + (0, 10)),
    ),
    "window in the wrong layer": (
        "gemma3",
        lambda m: _changed(m, layer_windows=(9,) * 4 + (0, 9, 9)),
    ),
    "one rope for all": ("gemma3", lambda m: _changed(m, local_rope=None)),
    "no embedding scale": ("gemma3", lambda m: _changed(m, embedding_scale=1.0)),
    "activation": ("gemma3", lambda m: _changed(m, activation="silu")),
    "no soft cap": ("gemma3-options", lambda m: _changed(m, final_soft_cap=None)),
}


@pytest.mark.parametrize("name", WRONG)
def test_judge_refuses_wrong_options(name, saved):
    case, change = WRONG[name]
    reference, path = saved(case, "safetensors")
    assert difference(reference, change(load_model(path))) > 10 * TOLERANCE


@pytest.mark.parametrize(
    ("case", "fault"), [("llama", {"permute": False}), ("gemma3", {"norm_offset": 0})]
)
def test_judge_refuses_wrong_files(case, fault, oracle, tmp_path):
    path = write_gguf(*hf.contents(oracle(case)), tmp_path / "wrong.gguf", **fault)
    assert difference(oracle(case), load_model(path)) > 10 * TOLERANCE


def test_judge_refuses_without_key_biases(saved):
    reference, path = saved("qwen2", "safetensors")
    model = load_model(path)
    layers = dataclasses.replace(model.params.layers, key_bias=0 * model.params.layers.key_bias)
    params = dataclasses.replace(model.params, layers=layers)
    assert difference(reference, dataclasses.replace(model, params=params)) > 10 * TOLERANCE


def test_text_decoder_of_a_model_with_vision(tmp_path):
    """Gemma 3 with vision has its text settings one level down and other tensors beside."""
    reference = hf.make_gemma3_with_vision()
    path = hf.save(reference, tmp_path / "model")
    assert difference(reference, load_model(path)) <= TOLERANCE
