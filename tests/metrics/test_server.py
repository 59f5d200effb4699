"""Prometheus and JSON over HTTP, as a scraper and a person ask for them."""

import json
import math
import socket
import threading
import urllib.error
import urllib.request

import pytest
from prometheus_client.parser import text_string_to_metric_families

from kvcompress_jax.metrics import fields
from kvcompress_jax.metrics.board import Board
from kvcompress_jax.metrics.server import MetricsServer
from tests.metrics.figures import ENGINE, board, manager_stats


@pytest.fixture(scope="module")
def server():
    with MetricsServer(board(), port=0) as server:
        yield server


def get(url, **headers):
    request = urllib.request.Request(url, headers=headers)
    with urllib.request.urlopen(request, timeout=30) as answer:
        return answer.read().decode(), answer.headers["Content-Type"]


def samples(text):
    """Values by name and labels."""
    return {
        (s.name, *s.labels.values()): s.value
        for family in text_string_to_metric_families(text)
        for s in family.samples
    }


def test_prometheus(server):
    text, content_type = get(f"{server.url}/metrics")
    assert content_type.startswith("text/plain; version=")
    found = samples(text)
    for name, value in {
        ("kvcompress_memory_saved_bytes",): 1.5e6,
        ("kvcompress_compression_ratio",): 2.5,
        ("kvcompress_effective_bits",): 6.5,
        ("kvcompress_pages", "0"): 1,
        ("kvcompress_pages", "2"): 10,
        ("kvcompress_seals_total",): 15,
        ("kvcompress_promotions_total",): 0,
        ("kvcompress_tier_bytes", "host"): 4096,
        ("kvcompress_output_error_mean_ratio",): 0.01,
        ("kvcompress_engine_requests_waiting",): 2,
        ("kvcompress_engine_generated_tokens_total",): 250,
        ("kvcompress_engine_requests_finished_total", "error"): 1,
        ("kvcompress_engine_step_seconds_bucket", "0.01"): 0,
        ("kvcompress_engine_step_seconds_bucket", "0.025"): 1,
        ("kvcompress_engine_step_seconds_bucket", "+Inf"): 1,
        ("kvcompress_engine_step_seconds_sum",): 0.02,
        ("kvcompress_build_info", "0.1.0"): 1,
    }.items():
        assert found[name] == value, name
    assert 0 <= found[("kvcompress_snapshot_age_seconds",)] < 600


def test_every_field_is_exported(server):
    """A field that is added to the statistics is a metric, even before it has a better name."""
    found = samples(get(f"{server.url}/metrics")[0])
    in_families = {f for _, _, members in fields.FAMILIES.values() for f in members}
    for field, value in manager_stats().items():
        if not isinstance(value, int | float) or field in in_families:
            continue
        names = {
            f"kvcompress_{field}",
            f"kvcompress_{field}_total",
            f"kvcompress_{fields.GAUGES.get(field, ('',))[0]}",
        }
        assert names & {n for n, *_ in found}, field


def test_names_and_units_are_the_usual_ones(server):
    for family in text_string_to_metric_families(get(f"{server.url}/metrics")[0]):
        assert family.name.startswith("kvcompress_") and family.documentation.endswith(".")
        assert not family.name.endswith(("_mb", "_ms", "_percent")), family.name


def test_open_metrics(server):
    text, content_type = get(f"{server.url}/metrics", Accept="application/openmetrics-text")
    assert content_type.startswith("application/openmetrics-text")
    assert text.rstrip().endswith("# EOF") and "kvcompress_seals_total 15.0" in text


def test_json(server):
    text, content_type = get(f"{server.url}/stats.json")
    found = json.loads(text)
    assert content_type == "application/json"
    assert found["engine"] == ENGINE and found["steps"] == 1
    assert found["stats"] == manager_stats()
    assert found["age_s"] >= 0 and found["uptime_s"] >= found["age_s"]


def test_before_the_first_figures_and_when_there_are_no_numbers():
    with MetricsServer(Board(), port=0) as server:
        assert json.loads(get(f"{server.url}/stats.json")[0])["stats"] == {}
        assert list(samples(get(f"{server.url}/metrics")[0])) == [
            ("kvcompress_build_info", "0.1.0")
        ]
    empty = board(effective_bits=None, telemetry_output_error_mean=math.nan)
    with MetricsServer(empty, port=0) as server:
        found = json.loads(get(f"{server.url}/stats.json")[0])["stats"]
        assert found["effective_bits"] is None and found["telemetry_output_error_mean"] is None
        assert ("kvcompress_effective_bits",) not in samples(get(f"{server.url}/metrics")[0])


def test_other_addresses_and_clients_that_are_not_nice(server):
    with pytest.raises(urllib.error.HTTPError, match="404"):
        get(f"{server.url}/../etc/passwd")
    with pytest.raises(urllib.error.HTTPError, match="501"):
        urllib.request.urlopen(f"{server.url}/metrics", data=b"x", timeout=30)
    connections = []
    for i in range(20):  # that connect and say nothing, or nonsense
        connections.append(socket.create_connection(("127.0.0.1", server.port), timeout=30))
        connections[-1].sendall(b"\0\xff\r\n" if i % 2 else b"GET /metrics")
    answers = []
    threads = [
        threading.Thread(target=lambda: answers.append(get(f"{server.url}/metrics")))
        for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert len(answers) == 8
    for connection in connections:
        connection.close()


def test_only_this_machine_may_ask(server):
    assert server.url.startswith("http://127.0.0.1:")
    with pytest.raises(OSError, match="in use"):
        MetricsServer(Board(), port=server.port)
