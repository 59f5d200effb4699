"""Figures of workers, by way of files, in Prometheus."""

import json
import os

import pytest

prometheus = pytest.importorskip("prometheus_client", reason="prometheus-client is not installed")

from kvcompress_jax.interop.vllm import metrics  # noqa: E402


@pytest.fixture
def directory(tmp_path, monkeypatch):
    monkeypatch.setenv(metrics.DIRECTORY_VARIABLE, str(tmp_path))
    monkeypatch.setattr(metrics, "_published", -1e9)
    return tmp_path


def exposed(directory):
    registry = prometheus.CollectorRegistry()
    registry.register(metrics.Collector(directory))
    return prometheus.generate_latest(registry).decode()


def test_published_figures_are_exposed_by_worker(directory):
    metrics.publish(lambda: {"memory_saved_mb": 1.5, "seals": 3, "effective_bits": None})
    worker = os.getpid()
    text = exposed(directory)
    assert f'vllm:kv_compression_memory_saved_mb{{worker="{worker}"}} 1.5' in text
    assert f'vllm:kv_compression_seals_total{{worker="{worker}"}} 3.0' in text
    assert "effective_bits{" not in text


def test_figures_are_written_seldom(directory):
    metrics.publish(lambda: {"seals": 1})
    metrics.publish(lambda: pytest.fail("asked for again at once"))
    (file,) = directory.iterdir()
    assert json.loads(file.read_text()) == {"seals": 1}


def test_nothing_without_workers_or_a_front_end(directory, monkeypatch):
    assert exposed(directory) == ""
    monkeypatch.setenv(metrics.DIRECTORY_VARIABLE, str(directory / "gone"))
    metrics.publish(lambda: {"seals": 1})  # the front end is gone: no error
    monkeypatch.delenv(metrics.DIRECTORY_VARIABLE)
    metrics.publish(lambda: pytest.fail("nobody reads"))
