"""Small random decoders of every architecture, without any file."""

import dataclasses

import jax

from kvcompress_jax.models.config import DecoderConfig, Llama3Scaling, Rope
from kvcompress_jax.models.load import Model
from kvcompress_jax.models.params import init_params

_BASE = DecoderConfig(
    architecture="llama",
    vocab_size=97,
    hidden_size=48,
    intermediate_size=64,
    num_layers=3,
    num_heads=4,
    num_kv_heads=2,
    head_dim=64,
    norm_eps=1e-6,
    tie_embeddings=True,
    query_scale=64**-0.5,
    rope=Rope(theta=1e4),
    layer_windows=(0, 0, 0),
    max_positions=4096,
)

CONFIGS = {
    "llama": dataclasses.replace(
        _BASE,
        rope=Rope(
            theta=1e4,
            scaling=Llama3Scaling(
                factor=8.0,
                low_frequency_factor=1.0,
                high_frequency_factor=4.0,
                original_max_positions=64,
            ),
        ),
    ),
    "qwen2": dataclasses.replace(
        _BASE, architecture="qwen2", qkv_bias=True, tie_embeddings=False, num_heads=6
    ),
    "qwen3": dataclasses.replace(
        _BASE,
        architecture="qwen3",
        qk_norm=True,
        head_dim=128,
        num_kv_heads=1,
        query_scale=128**-0.5,
    ),
    "gemma3": dataclasses.replace(
        _BASE,
        architecture="gemma3",
        qk_norm=True,
        post_norms=True,
        activation="gelu_tanh",
        embedding_scale=48**0.5,
        head_dim=256,
        num_kv_heads=1,
        query_scale=256**-0.5,
        local_rope=Rope(theta=1e3),
        sliding_window=24,
        layer_windows=(24, 0, 24),
    ),
}


def tiny_model(config: DecoderConfig, seed: int = 0) -> Model:
    """Random float32 weights."""
    params = init_params(config, jax.random.key(seed))
    return Model(config=config, params=params, tokenizer=None, name="tiny", fingerprint="tiny")


def random_tokens(config: DecoderConfig, length: int, seed: int) -> list[int]:
    return jax.random.randint(jax.random.key(seed), (length,), 0, config.vocab_size).tolist()
