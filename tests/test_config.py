"""Configuration: from code, from the environment, from a file; every mistake is named."""

import dataclasses

import pytest

from kvcompress_jax.config import RECIPES, CompressionConfig, ConfigError
from kvcompress_jax.importance import ImportanceWeights


def test_defaults_are_the_specifications():
    config = CompressionConfig.from_env({})
    assert config == CompressionConfig() == CompressionConfig.recipe("balanced")
    assert (config.enabled, config.ratio, config.levels) == (True, 0.5, 3)
    assert config.weights == ImportanceWeights(magnitude=0.4, learned=0.4, attention=0.2)


def test_the_owners_variables():
    environ = {
        "VLLM_ENABLE_KV_COMPRESSION": "0",
        "VLLM_KV_COMPRESSION_RATIO": "0.25",
        "VLLM_KV_COMPRESSION_LEVELS": "2",
        "PATH": "/bin",
    }
    config = CompressionConfig.from_env(environ)
    assert (config.enabled, config.ratio, config.levels) == (False, 0.25, 2)
    assert not config.compresses
    assert config.fine_rows == 0


def test_tokens_are_refined_by_two_bits_where_that_can_be():
    assert CompressionConfig().refining_bits == 2
    assert CompressionConfig().layout(layers=1, kv_heads=1, head_dim=2).refined_slots == 64
    for partly in ({"ratio": 0.25}, {"ratio": 0.25, "attention": "sum"}):
        layout = CompressionConfig(**partly).layout(layers=1, kv_heads=1, head_dim=2)
        assert (layout.fine_bits, layout.fine_rows, layout.refined_slots) == (2, 16, 32)
    # Rounding leads to half of the page at most.
    assert CompressionConfig(ratio=0.4999, page_size=64).fine_rows == 32
    for other in (
        {"fine_bits": 4},
        {"fine_bits": 4, "ratio": 0.25},
        {"ratio": 0.75},
        {"levels": 2},
        {"magnitude": "key_norm"},
        {"attention": "sum"},
        {"weights": ImportanceWeights(magnitude=1.0, learned=0.0, attention=0.0)},
        {"learned_importance": "file"},
    ):
        config = CompressionConfig(**other)
        assert config.refining_bits == 4
        assert config.layout(layers=1, kv_heads=1, head_dim=2).fine_bits == 4
        if "fine_bits" not in other:
            with pytest.raises(ConfigError, match="fine_bits: expected 4 unless levels=3 with"):
                CompressionConfig(**other, fine_bits=2)
    with pytest.raises(ConfigError, match="fine_bits: expected 2, 4 or None, got 3"):
        CompressionConfig(fine_bits=3)
    assert CompressionConfig.from_env({"KVCOMPRESS_FINE_BITS": "4"}).fine_bits == 4
    # Two levels have 8 bits for all: nothing to be even about.
    environ = {"KVCOMPRESS_FINE_BITS": "2", "VLLM_KV_COMPRESSION_LEVELS": "2"}
    with pytest.raises(ConfigError, match=r"KVCOMPRESS_FINE_BITS: expected 4 unless"):
        CompressionConfig.from_env(environ)


def test_explicit_arguments_win_over_the_environment():
    environ = {"VLLM_KV_COMPRESSION_RATIO": "0.25", "KVCOMPRESS_RECIPE": "compact"}
    config = CompressionConfig.from_env(environ, overrides={"ratio": 0.75})
    assert config.ratio == 0.75
    assert config.seal_level == 2


def test_two_levels_have_nothing_below_int8():
    config = CompressionConfig.from_env({"VLLM_KV_COMPRESSION_LEVELS": "2"})
    assert config.fine_rows == config.page_size
    compact = {"KVCOMPRESS_RECIPE": "compact", "VLLM_KV_COMPRESSION_LEVELS": "2"}
    assert CompressionConfig.from_env(compact).seal_level == 1
    assert CompressionConfig.from_env({"VLLM_KV_COMPRESSION_LEVELS": "1"}).compresses is False


def test_error_feedback_is_where_it_shows():
    assert CompressionConfig().feeds_errors_back
    assert not CompressionConfig.from_env({"KVCOMPRESS_ERROR_FEEDBACK": "0"}).feeds_errors_back
    assert CompressionConfig.from_env({"KVCOMPRESS_ERROR_FEEDBACK": "1"}).feeds_errors_back
    for changes in ({"enabled": False}, {"levels": 1}, {"levels": 2}, {"profile": "x"}):
        assert not CompressionConfig(**changes).feeds_errors_back
    assert CompressionConfig(levels=2, error_feedback=True).feeds_errors_back
    with pytest.raises(ConfigError, match="error_feedback: expected no profile beside it, got x"):
        CompressionConfig(error_feedback=True, profile="x")


@pytest.mark.parametrize("ratio", [0.01, 0.3, 0.5, 1.0])
@pytest.mark.parametrize("page_size", [16, 64, 256])
def test_fine_rows(ratio, page_size):
    rows = CompressionConfig(ratio=ratio, page_size=page_size).fine_rows
    assert rows == max(1, round(ratio * page_size))


@pytest.mark.parametrize(
    ("variable", "value", "message"),
    [
        ("VLLM_KV_COMPRESSION_RATIO", "1.5", "expected more than 0 and at most 1, got 1.5"),
        ("VLLM_KV_COMPRESSION_RATIO", "nan", "expected more than 0 and at most 1, got nan"),
        ("VLLM_KV_COMPRESSION_RATIO", "half", "expected a number, got 'half'"),
        ("VLLM_KV_COMPRESSION_LEVELS", "9", "expected 1, 2 or 3, got 9"),
        ("VLLM_KV_COMPRESSION_LEVELS", "2.5", "expected a whole number, got '2.5'"),
        ("VLLM_ENABLE_KV_COMPRESSION", "maybe", "expected 0 or 1, got 'maybe'"),
        ("KVCOMPRESS_PAGE_SIZE", "48", r"expected one of \(16, 32, 64, 128, 256\), got 48"),
        (
            "KVCOMPRESS_RECIPE",
            "best",
            "expected one of safe, balanced, mixed, compact, extreme, got 'best'",
        ),
        ("KVCOMPRESS_PAGESIZE", "64", "no such variable, expected one of"),
        ("KVCOMPRESS_SINK_TOKENS", "64", r"expected 0 to 63 \(page_size - 1\), got 64"),
        ("KVCOMPRESS_WINDOW_TOKENS", "-1", "expected at least 0, got -1"),
        ("KVCOMPRESS_DISK_PATH", "/tmp", "expected disk_bytes to be more than 0, got 0"),
        ("KVCOMPRESS_DISK_BYTES", "1 GB", "expected a whole number, got '1 GB'"),
        ("KVCOMPRESS_DEMOTE_AFTER_TOKENS", "1", "expected None, or at least window_tokens=64"),
    ],
)
def test_errors_name_the_variable(variable, value, message):
    with pytest.raises(ConfigError, match=f"^{variable}: {message}"):
        CompressionConfig.from_env({variable: value})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ratio": 0.0}, "ratio: expected more than 0 and at most 1, got 0.0"),
        ({"seal_level": 0}, "seal_level: expected 1 or 2, got 0"),
        ({"levels": 2, "seal_level": 2}, "seal_level: expected a level below levels=2, got 2"),
        ({"heat_decay": 1.0}, "heat_decay: expected more than 0, less than 1, got 1.0"),
        ({"promote_heat": 0.5}, "promote_heat: expected at least 1, got 0.5"),
        ({"magnitude": "size"}, "magnitude: expected .*'specification'.*, got size"),
        ({"host_bytes": -1}, "host_bytes: expected at least 0, got -1"),
        ({"disk_bytes": -1}, "disk_bytes: expected at least 0, got -1"),
        ({"disk_path": "x"}, "disk_path: expected disk_bytes to be more than 0, got 0"),
        (
            {"disk_path": "x", "disk_bytes": 1},
            "disk_path: expected host_bytes to be more than 0, got 0",
        ),
        (
            {"disk_path": "x", "disk_bytes": 1, "host_bytes": 1, "seal_level": 2},
            "disk_path: expected None where no page is demoted .*, got x",
        ),
    ],
)
def test_errors_name_the_field(change, message):
    with pytest.raises(ConfigError, match=message):
        CompressionConfig(**change)


def test_toml(tmp_path):
    path = tmp_path / "config.toml"
    path.write_text(
        'recipe = "compact"\npage_size = 128\nfloor_layers = [0, -1]\nratio = 1\n'
        "[weights]\nmagnitude = 0.2\nlearned = 0.0\nattention = 0.8\n"
    )
    config = CompressionConfig.from_toml(path)
    assert config == dataclasses.replace(
        RECIPES["compact"],
        page_size=128,
        floor_layers=(0, -1),
        ratio=1,
        weights=ImportanceWeights(magnitude=0.2, learned=0.0, attention=0.8),
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("page_size = 48", r"page_size: expected one of \(16"),
        ('page_size = "64"', "page_size: expected int, got '64'"),
        ("pages = 64", "pages: no such field, expected one of"),
        ("page_size = ", "expected a TOML file, got: "),
        ('recipe = "best"', "recipe: expected one of safe"),
        ("weights = 3", "weights: expected a table with"),
        ("[weights]\nmagnitude = -1.0", "weights: expected finite numbers"),
        ("enabled = 1", "enabled: expected bool, got 1"),
    ],
)
def test_toml_errors(tmp_path, text, message):
    path = tmp_path / "config.toml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message):
        CompressionConfig.from_toml(path)


def test_no_such_file(tmp_path):
    with pytest.raises(ConfigError, match=r"nowhere\.toml: expected a TOML file, got: "):
        CompressionConfig.from_toml(tmp_path / "nowhere.toml")


def test_the_disk_tier_comes_from_three_variables():
    environ = {
        "KVCOMPRESS_DISK_PATH": "/tmp/planes",
        "KVCOMPRESS_DISK_BYTES": "1000",
        "KVCOMPRESS_HOST_BYTES": "100",
    }
    config = CompressionConfig.from_env(environ)
    assert (config.disk_path, config.disk_bytes, config.host_bytes) == ("/tmp/planes", 1000, 100)
    assert not CompressionConfig.from_env(
        environ | {"VLLM_ENABLE_KV_COMPRESSION": "0"}
    ).keeps_fine_planes
