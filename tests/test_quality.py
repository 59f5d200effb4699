"""The gate's own rules, without a model."""

import dataclasses

import pytest

from kvcompress_jax import codec
from kvcompress_jax.config import CompressionConfig, ConfigError
from kvcompress_jax.quality import (
    Measured,
    QualityBound,
    QualityError,
    admit,
    settings_digest,
    unmeasured,
)

BOUND = QualityBound(kl=0.01, top1=0.95)


def measured(config, **changes):
    seen = Measured(
        fingerprint="this",
        model="a model",
        settings=settings_digest(config),
        kl=0.01,
        top1=0.95,
        bits=4.5,
        context_tokens=1024,
        texts="prose",
    )
    return dataclasses.replace(config, measured=dataclasses.replace(seen, **changes))


def test_bounds_hold_at_their_edge_and_not_beyond():
    config = CompressionConfig(bound=BOUND)
    admit(measured(config), "this")
    for changes in ({"kl": 0.0101}, {"top1": 0.949}, {"kl": float("nan")}, {"top1": float("nan")}):
        with pytest.raises(QualityError, match="expected at"):
            admit(measured(config, **changes), "this")
    only_top1 = CompressionConfig(bound=QualityBound(top1=0.95))
    admit(measured(only_top1, kl=9.0), "this")


def test_nothing_to_keep():
    for config in (
        CompressionConfig(),
        CompressionConfig(bound=BOUND, enabled=False),
        CompressionConfig(bound=BOUND, levels=1),
    ):
        admit(config, "any")
        assert unmeasured(config, "any") is None


def test_a_measurement_is_of_one_version_of_the_code(monkeypatch):
    """The same settings may give other codes in another version."""
    config = measured(CompressionConfig(bound=BOUND))
    assert unmeasured(config, "this") is None
    monkeypatch.setattr(codec, "CODE_VERSION", codec.CODE_VERSION + 1)
    assert unmeasured(config, "this") == "it was changed since it was measured"


def test_what_is_left_to_the_code_counts_as_what_it_comes_to():
    eight, six, either = (CompressionConfig(ratio=0.25, fine_bits=bits) for bits in (4, 2, None))
    assert settings_digest(either) == settings_digest(six) != settings_digest(eight)


def test_a_measurement_is_of_one_model_and_of_all_settings_that_matter(tmp_path):
    profile = tmp_path / "profile"
    profile.write_bytes(b"one")
    config = measured(CompressionConfig(bound=BOUND, profile=str(profile)))
    assert unmeasured(config, "this") is None
    assert "measured on another model" in unmeasured(config, "that")
    copy = tmp_path / "copy"
    copy.write_bytes(b"one")
    assert unmeasured(dataclasses.replace(config, profile=str(copy)), "this") is None
    for changes in ({"window_tokens": 0}, {"sink_tokens": 3}, {"page_size": 128}):
        changed = dataclasses.replace(config, **changes)
        assert unmeasured(changed, "this") == "it was changed since it was measured"
    for changes in ({"host_bytes": 5}, {"telemetry_share": 0.5}, {"bound": QualityBound(kl=1)}):
        assert unmeasured(dataclasses.replace(config, **changes), "this") is None
    profile.write_bytes(b"two")
    assert unmeasured(config, "this") == "it was changed since it was measured"
    profile.unlink()
    with pytest.raises(ConfigError, match="profile: expected a file that can be read, got"):
        unmeasured(config, "this")
