"""Files to models, with nothing but NumPy to write them."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from kvcompress_jax.models.config import FrequencyDivisors, LinearScaling, Rope
from kvcompress_jax.models.dense import dense_forward
from kvcompress_jax.models.hf_config import config_from_json
from kvcompress_jax.models.load import load_model
from kvcompress_jax.models.params import init_params
from tests.models.files import hf_settings, hf_state, write_directory, write_gguf
from tests.models.tiny import CONFIGS


@pytest.fixture(params=CONFIGS)
def tiny(request):
    config = CONFIGS[request.param]
    return config, init_params(config, jax.random.key(1))


def _logits(params, config):
    tokens = np.random.default_rng(0).integers(0, config.vocab_size, (2, 20), dtype=np.int32)
    return np.asarray(dense_forward(params, config, jnp.asarray(tokens)))


def test_directory_gives_the_same_model(tiny, tmp_path):
    config, params = tiny
    path = write_directory(hf_settings(config), hf_state(params, config), tmp_path / "model")
    model = load_model(path)
    expected_eos = config.eos_token_ids or (2,)
    assert model.config == dataclasses.replace(config, eos_token_ids=expected_eos)
    assert model.name == "model"
    assert model.tokenizer is None
    np.testing.assert_allclose(
        _logits(model.params, model.config), _logits(params, model.config), atol=1e-5, rtol=0
    )


def test_gguf_gives_the_same_model(tiny, tmp_path):
    config, params = tiny
    path = write_gguf(hf_settings(config), hf_state(params, config), tmp_path / "tiny.gguf")
    model = load_model(path)
    assert model.name == "tiny"
    assert model.config.layer_windows == config.layer_windows
    expected = _logits(params, config)
    assert np.abs(_logits(model.params, model.config) - expected).max() <= 1e-5
    wrong = dataclasses.replace(
        model.params, embedding=jnp.roll(model.params.embedding, 1, axis=-1)
    )
    assert np.abs(_logits(wrong, model.config) - expected).max() > 1e-3


def test_sharded_directory(tmp_path):
    config = CONFIGS["qwen3"]
    state = hf_state(init_params(config, jax.random.key(1)), config)
    whole = load_model(write_directory(hf_settings(config), state, tmp_path / "whole"))
    path = write_directory(hf_settings(config), {}, tmp_path / "shards")
    (path / "model.safetensors").unlink()
    shards = {name: f"model-{i % 2 + 1}-of-2.safetensors" for i, name in enumerate(state)}
    for shard in set(shards.values()):
        save_file({k: v for k, v in state.items() if shards[k] == shard}, path / shard)
    index = path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": shards}))
    sharded = load_model(path)
    assert jax.tree.all(
        jax.tree.map(lambda a, b: bool((a == b).all()), sharded.params, whole.params)
    )
    (path / "model-2-of-2.safetensors").unlink()
    with pytest.raises(ValueError, match=r"model-2-of-2\.safetensors, named by .* is missing"):
        load_model(path)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_dtype_of_weights_and_norms(tiny, tmp_path, dtype):
    config, params = tiny
    state = hf_state(params, config)
    low = {k: v if "norm" in k else np.asarray(jnp.asarray(v, dtype)) for k, v in state.items()}
    model = load_model(write_directory(hf_settings(config), low, tmp_path / "low"), dtype=dtype)
    assert model.params.layers.query.dtype == jnp.dtype(dtype)
    assert model.params.layers.attention_norm.dtype == jnp.float32
    got = _logits(model.params, model.config)
    assert got.dtype == np.float32
    # Rounding of each step to 8 (bfloat16) or 11 bits adds up; logits are of order 1.
    error = np.abs(got - _logits(params, config)).mean()
    assert 0 < error < 16 * float(jnp.finfo(dtype).eps)
    # The same file in float32 is exact where the file is.
    full = load_model(tmp_path / "low")
    np.testing.assert_array_equal(
        full.params.layers.query, model.params.layers.query.astype(jnp.float32)
    )


def test_unknown_dtype_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"dtype: expected one of .*, got int8"):
        load_model(tmp_path, dtype=jnp.int8)


def test_fingerprint_is_of_weights_configuration_and_dtype(tmp_path):
    config = CONFIGS["llama"]
    settings, state = hf_settings(config), hf_state(init_params(config, jax.random.key(1)), config)
    path = write_directory(settings, state, tmp_path / "a")
    same = write_directory(settings, state, tmp_path / "b")
    first = load_model(path).fingerprint
    assert len(first) == 64
    assert load_model(same).fingerprint == first
    other = {k: v.copy() for k, v in state.items()}
    other["model.layers.1.mlp.down_proj.weight"][3, 3] += 1e-3
    changed = [
        load_model(write_directory(settings, other, tmp_path / "c")),
        load_model(write_directory(settings | {"rms_norm_eps": 2e-5}, state, tmp_path / "d")),
        load_model(path, dtype=jnp.bfloat16),
    ]
    assert len({first, *(m.fingerprint for m in changed)}) == 4


def test_quantised_gguf_is_dequantised(tmp_path):
    import gguf

    config = dataclasses.replace(CONFIGS["qwen3"], hidden_size=64)
    params = init_params(config, jax.random.key(1))
    path = write_gguf(hf_settings(config), hf_state(params, config), tmp_path / "f32.gguf")
    reader = gguf.GGUFReader(path)
    writer = gguf.GGUFWriter(tmp_path / "q8.gguf", "qwen3")
    for name, field in reader.fields.items():
        if not name.startswith("GGUF.") and name != "general.architecture":
            writer.add_key_value(name, field.contents(), field.types[0])
    kind = gguf.GGMLQuantizationType.Q8_0
    for t in reader.tensors:
        matrix = t.data.ndim == 2
        data = gguf.quants.quantize(t.data, kind) if matrix else np.array(t.data)
        writer.add_tensor(t.name, data, raw_dtype=kind if matrix else None)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    model = load_model(tmp_path / "q8.gguf")
    got, expected = np.asarray(model.params.layers.up), np.asarray(params.layers.up)
    # 8-bit codes of blocks of 32: half a step is 1/254 of the largest value of a block.
    assert 0 < np.abs(got - expected).max() <= np.abs(expected).max() / 254 * 1.01


def test_older_config_files():
    """Flat RoPE settings, and nothing that has a default."""
    llama = {
        "model_type": "llama",
        "vocab_size": 32,
        "hidden_size": 64,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
    }
    config = config_from_json("f", llama | {"rope_scaling": {"type": "linear", "factor": 2}})
    assert (config.num_kv_heads, config.head_dim, config.tie_embeddings) == (4, 16, False)
    assert config.rope == Rope(theta=10_000.0, scaling=LinearScaling(factor=2.0))
    gemma = {"model_type": "gemma3_text", "num_hidden_layers": 12, "sliding_window": 512}
    scaling = {"rope_type": "linear", "factor": 8.0}
    config = config_from_json("f", gemma | {"rope_scaling": scaling, "eos_token_id": [1, 106]})
    assert config.layer_windows == ((512,) * 5 + (0,)) * 2
    assert config.rope == Rope(theta=1e6, scaling=LinearScaling(factor=8.0))
    assert config.local_rope == Rope(theta=1e4)
    assert config.eos_token_ids == (1, 106)
    assert config.query_scale == 256**-0.5


def test_gguf_rope_divisors_replace_llama3_scaling(tmp_path):
    config = CONFIGS["llama"]
    state = hf_state(init_params(config, jax.random.key(1)), config)
    model = load_model(write_gguf(hf_settings(config), state, tmp_path / "m.gguf"))
    assert isinstance(model.config.rope.scaling, FrequencyDivisors)
    assert min(model.config.rope.scaling.divisors) == 1
    assert max(model.config.rope.scaling.divisors) == 8


def test_other_tensors_of_a_tied_directory_are_ignored(tmp_path):
    config = CONFIGS["qwen3"]
    settings, state = hf_settings(config), hf_state(init_params(config, jax.random.key(1)), config)
    state["lm_head.weight"] = state["model.embed_tokens.weight"]
    state["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(48, np.float32)
    path = write_directory(settings, state, tmp_path / "m")
    assert load_model(path).params.unembedding is None
    assert "lm_head.weight" in load_file(path / "model.safetensors")


@pytest.mark.parametrize(
    ("metadata", "scaling"),
    [
        ({"qwen3__rope__scaling__type": "none", "qwen3__rope__scaling__factor": 4}, None),
        ({"qwen3__rope__scaling__factor": 4}, LinearScaling(factor=4.0)),
        ({"qwen3__rope__scale_linear": 4}, LinearScaling(factor=4.0)),
        ({"qwen3__rope__scale_linear": 1}, None),
    ],
)
def test_gguf_linear_scaling(metadata, scaling, tmp_path):
    config = CONFIGS["qwen3"]
    state = hf_state(init_params(config, jax.random.key(1)), config)
    path = write_gguf(hf_settings(config), state, tmp_path / "m.gguf", **metadata)
    assert load_model(path).config.rope.scaling == scaling
