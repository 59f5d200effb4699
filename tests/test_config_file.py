"""A configuration through TOML and back, and KVCOMPRESS_CONFIG."""

import dataclasses

import pytest

from kvcompress_jax.config import RECIPES, CompressionConfig, ConfigError
from kvcompress_jax.config_file import as_toml
from kvcompress_jax.importance import ImportanceWeights
from kvcompress_jax.quality import Measured, QualityBound

MEASURED = Measured(
    fingerprint="ab" * 32,
    model='a "model" with \\ in its name',
    settings="cd" * 32,
    kl=0.00123,
    top1=0.97,
    bits=5.31,
    context_tokens=1024,
    texts="prose, code",
)
CONFIGS = {
    **RECIPES,
    "floors": CompressionConfig(seal_level=2, floor_layers=(0, 7, -1), ratio=0.0625),
    "weights": CompressionConfig(weights=ImportanceWeights(magnitude=1, learned=0, attention=0)),
    "gate": CompressionConfig(bound=QualityBound(kl=1e-5), measured=MEASURED, force=True),
    "both": CompressionConfig(bound=QualityBound(kl=0.05, top1=0.9), host_bytes=1 << 40),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_there_and_back(tmp_path, name):
    path = tmp_path / "config.toml"
    path.write_text(as_toml(CONFIGS[name], folder=tmp_path, comment="two\nlines"))
    assert CompressionConfig.from_toml(path) == CONFIGS[name]
    assert path.read_text().startswith("# two\n# lines\n")
    assert CompressionConfig.from_env({"KVCOMPRESS_CONFIG": str(path)}) == CONFIGS[name]


def test_files_are_relative_to_the_configuration(tmp_path, monkeypatch):
    """Written in one folder, read from another place: it is still the same file."""
    (tmp_path / "a").mkdir()
    monkeypatch.chdir(tmp_path / "a")
    config = CompressionConfig(profile="code.safetensors")
    path = tmp_path / "config.toml"
    path.write_text(as_toml(config, folder=tmp_path))
    assert 'profile = "a/code.safetensors"' in path.read_text()
    monkeypatch.chdir("/")
    found = CompressionConfig.from_toml(path)
    assert found.profile == str(tmp_path / "a" / "code.safetensors")
    absolute = tmp_path / "absolute.toml"
    absolute.write_text('profile = "/somewhere/code.safetensors"\n')
    assert CompressionConfig.from_toml(absolute).profile == "/somewhere/code.safetensors"


def test_the_environment_changes_what_the_file_says(tmp_path):
    path = tmp_path / "config.toml"
    path.write_text('recipe = "compact"\npage_size = 128\n[bound]\ntop1 = 0.9\n')
    environ = {"KVCOMPRESS_CONFIG": str(path), "KVCOMPRESS_FORCE": "1"}
    config = CompressionConfig.from_env(environ | {"KVCOMPRESS_WINDOW_TOKENS": "0"})
    assert config == dataclasses.replace(
        RECIPES["compact"],
        page_size=128,
        window_tokens=0,
        bound=QualityBound(top1=0.9),
        force=True,
    )


@pytest.mark.parametrize(
    ("environ", "message"),
    [
        ({"KVCOMPRESS_CONFIG": "nowhere.toml"}, r"KVCOMPRESS_CONFIG: nowhere\.toml: expected a TO"),
        (
            {"KVCOMPRESS_CONFIG": "x", "KVCOMPRESS_RECIPE": "safe"},
            "KVCOMPRESS_CONFIG: expected no KVCOMPRESS_RECIPE beside it",
        ),
        ({"KVCOMPRESS_FORCE": "perhaps"}, "KVCOMPRESS_FORCE: expected 0 or 1, got 'perhaps'"),
    ],
)
def test_errors_name_the_variable(environ, message):
    with pytest.raises(ConfigError, match=message):
        CompressionConfig.from_env(environ)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[bound]", "bound: expected kl or top1, got neither"),
        ("[bound]\nkl = -1.0", "bound: kl: expected a number of nats, at least 0, got -1.0"),
        ("[bound]\nkl = nan", "bound: kl: expected a number of nats, at least 0, got nan"),
        ("[bound]\ntop1 = 1.5", "bound: top1: expected 0 to 1, got 1.5"),
        ('[bound]\nkl = "low"', "bound: kl: expected a number, got 'low'"),
        ("[bound]\nkl = true", "bound: kl: expected a number, got True"),
        ("[bound]\nppl = 1", r"bound: expected a table with \['kl', 'top1'\]"),
        ("[measured]\nkl = 1.0", "measured: .*missing"),
        ("[measured]\nfingerprint = 3", "measured: fingerprint: expected a text, got 3"),
    ],
)
def test_errors_of_the_tables(tmp_path, text, message):
    path = tmp_path / "config.toml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message):
        CompressionConfig.from_toml(path)
