"""What cannot be compressed is an error at the start of a real engine, which says what to do."""

import pytest

SPACE = {"VLLM_CPU_KVCACHE_SPACE": "1"}
SPECULATIVE = {"method": "ngram", "num_speculative_tokens": 2, "prompt_lookup_max": 3}
# Small models of other kinds, as far as their configuration.
LATENT = {
    "architectures": ["DeepseekV2ForCausalLM"],
    "model_type": "deepseek_v2",
    "hidden_size": 128,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "kv_lora_rank": 64,
    "q_lora_rank": None,
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 32,
    "v_head_dim": 32,
    "vocab_size": 512,
    "max_position_embeddings": 1024,
}
SLIDING = {
    "architectures": ["MistralForCausalLM"],
    "model_type": "mistral",
    "hidden_size": 128,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "sliding_window": 128,
    "vocab_size": 512,
    "max_position_embeddings": 1024,
}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kv_cache_dtype": "fp8"}, "kv_cache_dtype: expected auto with KV compression, got fp8"),
        ({"speculative_config": SPECULATIVE}, "speculative decoding: expected None with KV comp"),
        ({"block_size": 48}, "block_size: expected one of"),
        ({"attention_backend": "CPU_ATTN"}, "attention backend: expected none or CUSTOM"),
    ],
    ids=["fp8", "speculative", "block size", "backend"],
)
def test_an_option_that_cannot_be_is_refused(drive, options, message):
    assert message in drive("start", {"options": options}, fails=True, **SPACE)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (LATENT, "multi-head latent attention: expected False with KV compression, got True"),
        (SLIDING, "KV compression: a layer with a sliding window is not supported"),
    ],
    ids=["latent", "sliding"],
)
def test_a_model_that_cannot_be_compressed_is_refused(drive, config, message):
    assert message in drive("start", {"options": {}, "config": config}, fails=True, **SPACE)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"KVCOMPRESS_RECIPE": "none"}, "KVCOMPRESS_RECIPE: expected one of"),
        ({"KVCOMPRESS_PROFILE": "x"}, "x: expected a profile of `kvcompress calibrate`"),
        ({"KVCOMPRESS_TELEMETRY_SHARE": "0.1"}, "KVCOMPRESS_TELEMETRY_SHARE: not supported inside"),
    ],
    ids=["recipe", "profile", "telemetry"],
)
def test_a_setting_that_cannot_be_is_refused(drive, settings, message):
    assert message in drive("start", {"options": {}}, fails=True, **SPACE, **settings)


def test_one_more_engine_starts_all_the_same(drive):
    """The judge can say no."""
    with pytest.raises(AssertionError, match="expected a failure"):
        drive("start", {"options": {}}, fails=True, **SPACE)
