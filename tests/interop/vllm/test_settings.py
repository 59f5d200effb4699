"""What the environment may ask for inside vLLM."""

import functools

import pytest

from kvcompress_jax.config import CompressionConfig, ConfigError
from kvcompress_jax.interop.vllm.settings import enabled, fine_share, raw_share, read_config


def test_on_unless_switched_off():
    assert enabled({}) and enabled({"VLLM_ENABLE_KV_COMPRESSION": "1"})
    assert not enabled({"VLLM_ENABLE_KV_COMPRESSION": "0"})
    # Switched off, nothing else is looked at.
    assert not enabled({"VLLM_ENABLE_KV_COMPRESSION": "0", "KVCOMPRESS_RECIPE": "none"})
    with pytest.raises(ConfigError, match="VLLM_ENABLE_KV_COMPRESSION: expected 0 or 1"):
        enabled({"VLLM_ENABLE_KV_COMPRESSION": "maybe"})


def test_the_specification_s_variables():
    config = read_config(
        128, {"VLLM_KV_COMPRESSION_RATIO": "0.25", "VLLM_KV_COMPRESSION_LEVELS": "3"}
    )
    assert (config.page_size, config.ratio, config.levels) == (128, 0.25, 3)


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        ("KVCOMPRESS_TELEMETRY_SHARE", "0.5"),
        ("KVCOMPRESS_PREFIX_CACHE_BYTES", "1024"),
        ("KVCOMPRESS_DEMOTE_AFTER_TOKENS", "512"),
    ],
)
def test_what_cannot_be_honoured_is_refused_by_name(variable, value):
    with pytest.raises(ConfigError, match=f"{variable}: not supported inside vLLM"):
        read_config(None, {variable: value})


@pytest.mark.parametrize(
    ("read", "name", "most"),
    [
        (raw_share, "VLLM_KV_COMPRESSION_RAW_SHARE", 0.9),
        (
            functools.partial(fine_share, CompressionConfig()),
            "VLLM_KV_COMPRESSION_FINE_SHARE",
            1.0,
        ),
    ],
)
def test_shares(read, name, most):
    assert 0 < read({}) < 1
    assert read({name: "0.5"}) == 0.5
    for wrong in ("0", "-1", "nan", "much", str(most + 0.01)):
        with pytest.raises(ConfigError, match=f"{name}: expected more than 0 and at most {most}"):
            read({name: wrong})


def test_with_two_levels_every_block_has_a_chunk():
    two = {"VLLM_KV_COMPRESSION_LEVELS": "2"}
    assert fine_share(read_config(None, two), two) == 1
    assert fine_share(read_config(None, {}), {}) < 1
    name = "VLLM_KV_COMPRESSION_FINE_SHARE"
    assert fine_share(read_config(None, two | {name: "1"}), two | {name: "1"}) == 1
    with pytest.raises(ConfigError, match=f"{name}: expected 1 with two levels, got 0.75"):
        read_config(None, two | {name: "0.75"})
