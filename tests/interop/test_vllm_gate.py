"""The gate at vLLM's start, without vLLM."""

import dataclasses

import pytest

from kvcompress_jax.config import CompressionConfig
from kvcompress_jax.interop.vllm import gate
from kvcompress_jax.models.load import load_model, read_outline
from kvcompress_jax.quality import Measured, QualityBound, QualityError, settings_digest
from tests.lab.small import write_small_model


def test_a_tuned_configuration_serves_its_model_and_no_other(tmp_path):
    model = write_small_model(tmp_path / "tiny")
    other = write_small_model(tmp_path / "other", "qwen2")
    fingerprint = load_model(model).fingerprint
    assert read_outline(model).fingerprint == fingerprint != read_outline(other).fingerprint
    config = CompressionConfig(bound=QualityBound(kl=0.05), error_feedback=False)
    measured = Measured(
        fingerprint=fingerprint,
        model="tiny",
        settings=settings_digest(config),
        kl=0.01,
        top1=0.99,
        bits=6.0,
        context_tokens=1024,
        texts="prose",
    )
    config = dataclasses.replace(config, measured=measured)
    gate.check(config, str(model))
    with pytest.raises(QualityError, match="measured on another model"):
        gate.check(config, str(other))
    worse = dataclasses.replace(config, measured=dataclasses.replace(measured, kl=0.06))
    with pytest.raises(QualityError, match=r"kl: expected at most 0\.05 nats per token, got 0\.06"):
        gate.check(worse, str(model))
    gate.check(dataclasses.replace(worse, force=True), str(model))
    gate.check(CompressionConfig(), "nowhere")
    elsewhere = dataclasses.replace(config, error_feedback=None)
    with pytest.raises(QualityError, match="measured with error feedback, which keys inside vLLM"):
        gate.check(elsewhere, str(model))
    asked = dataclasses.replace(config, error_feedback=True)
    fed = dataclasses.replace(measured, settings=settings_digest(asked))
    gate.check(dataclasses.replace(asked, measured=fed), str(model))


def test_a_model_that_cannot_be_read_is_not_known(tmp_path, caplog):
    config = CompressionConfig(bound=QualityBound(kl=0.05), error_feedback=False)
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(QualityError, match="nobody can tell whether it is the model that was"):
        gate.check(config, str(empty))
    gate.check(dataclasses.replace(config, force=True), str(empty))
    assert "quality gate, forced" in caplog.text
