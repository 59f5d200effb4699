"""The command line as a user meets it."""

import contextlib
import dataclasses
import json
import math
import socket
import threading

import pytest

from kvcompress_jax.cli import main
from kvcompress_jax.lab.evaluate import Evaluation
from tests.lab.small import TEXT, write_small_model


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_small_model(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(TEXT)
    return path


def run(capsys, *argv):
    """Exit code and what was printed to either stream."""
    try:
        code = main([str(a) for a in argv])
    except SystemExit as e:
        code = e.code
    out = capsys.readouterr()
    return code, out.out, out.err


def test_eval(capsys, model, text, tmp_path):
    """kvcompress eval --model DIR --text FILE ... --json OUT"""
    out = tmp_path / "out.json"
    config = tmp_path / "config.toml"
    config.write_text('recipe = "balanced"\npage_size = 16\nwindow_tokens = 16\n')
    code, shown, error = run(
        capsys,
        *("eval", "--model", model, "--text", text, "--config", config, "--json", out),
        *("--context", 400, "--continuation", 40, "--facts", 4),
    )
    assert (code, error) == (0, "")
    assert "bits per value, sealed pages" in shown
    result = json.loads(out.read_text())
    for field in dataclasses.fields(Evaluation):
        assert math.isfinite(result[field.name]), field.name
    assert 6.5 < result["effective_bits"] < result["cache_bits"] + 1
    assert 0 < result["memory_saved_fraction"] < 0.6
    assert result["allocated_bytes"] < result["uncompressed_bytes"]
    assert 0 < result["kl_mean"] <= result["kl_p99"]
    assert result["recipe"] == "custom" and result["config"]["page_size"] == 16


def test_eval_of_the_uncompressed_model_finds_no_difference(capsys, model, text, tmp_path):
    out, config = tmp_path / "out.json", tmp_path / "config.toml"
    config.write_text("enabled = false\npage_size = 16\n")
    code, _, _ = run(
        capsys,
        *("eval", "--model", model, "--text", text, "--config", config, "--json", out),
        *("--context", 64, "--continuation", 16, "--facts", 0, "--chunk", 24),
    )
    result = json.loads(out.read_text())
    assert code == 0
    assert result["effective_bits"] == 16 and result["retrieval_accuracy"] is None
    assert result["kl_mean"] < 1e-6 and result["top1_agreement"] == 1
    assert result["attention_output_error"] < 1e-5


def test_demo(capsys, model, text, tmp_path, monkeypatch):
    """kvcompress demo: everything it promises is there, if not for a real model."""
    from kvcompress_jax.lab import demo

    monkeypatch.setattr(demo, "ANSWER_TOKENS", 4)
    monkeypatch.setattr(demo, "RECIPES", {"balanced": demo.RECIPES["balanced"]})
    plot, out = tmp_path / "plot.png", tmp_path / "out.json"
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    seen: list[dict] = []
    over = threading.Event()
    watcher = threading.Thread(target=watch, args=(port, seen, over))
    watcher.start()
    code, shown, error = run(
        capsys,
        *("demo", "--model", model, "--text", text, "--plot", plot, "--json", out),
        *("--serve-metrics", port),
    )
    over.set()
    watcher.join()
    assert (code, error) == (0, "")
    assert f"metrics: http://127.0.0.1:{port}/metrics" in shown
    assert any(f["stats"] and f["stats"]["tokens"] > 100 and f["steps"] for f in seen)
    for part in ("Answers", "tokens per GiB", "Pages over time", "Fidelity against bits"):
        assert part in shown
    assert plot.read_bytes().startswith(b"\x89PNG")
    result = json.loads(out.read_text())
    compressed, plain = result["compressed"], result["uncompressed"]
    assert compressed["stats"]["allocated_bytes"] < plain["stats"]["allocated_bytes"]
    assert compressed["tokens_per_gib"] > 2 * plain["tokens_per_gib"]
    assert len(compressed["answers"]) == len(result["questions"]) == 8
    assert any(step["level_1"] for step in compressed["pages_over_time"])
    assert plain["stats"]["seals"] == 0


def watch(port, seen, over):
    """Asks for the demo's figures while it runs."""
    from kvcompress_jax.metrics.commands import MetricsError
    from kvcompress_jax.metrics.top import fetch

    while not over.wait(0.05):
        with contextlib.suppress(MetricsError):
            seen.append(fetch(f"http://127.0.0.1:{port}"))


@pytest.mark.parametrize(
    ("environ", "message"),
    [
        ({"VLLM_KV_COMPRESSION_RATIO": "1.5"}, "VLLM_KV_COMPRESSION_RATIO: expected more than 0"),
        ({"VLLM_KV_COMPRESSION_LEVELS": "9"}, "VLLM_KV_COMPRESSION_LEVELS: expected 1, 2 or 3"),
        ({"KVCOMPRESS_PAGE_SIZE": "48"}, "KVCOMPRESS_PAGE_SIZE: expected one of (16, 32, 64"),
    ],
)
@pytest.mark.parametrize("command", ["eval", "demo"])
def test_a_wrong_environment(capsys, monkeypatch, command, environ, message):
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    one_line_and_code_2(run(capsys, command, "--recipe", "balanced"), message)


def test_mistakes(capsys, model, text, tmp_path):
    empty, missing = tmp_path / "empty.txt", tmp_path / "missing.txt"
    empty.write_text("  \n")
    bad = tmp_path / "bad.toml"
    bad.write_text("page_size = 48")
    short = tmp_path / "short.txt"
    short.write_text("too short")
    binary = tmp_path / "binary.gguf"
    binary.write_bytes(b"GGUF\x03\x00\x00\x00")
    for argv, message in (
        (["eval", "--text", empty], f"{empty}: expected some text, got none"),
        (["demo", "--text", missing], f"{missing}: expected a text file in UTF-8"),
        (["eval", "--config", bad], f"{bad}: page_size: expected one of"),
        (["eval", "--model", tmp_path / "no.gguf", "--text", text], "no.gguf: no such file"),
        (["eval", "--model", binary, "--text", text], "binary.gguf: "),
        (
            ["eval", "--model", model, "--text", text, "--context", 64, "--continuation", 8],
            "context: no room for 32 facts in 64 tokens",
        ),
        (
            ["eval", "--model", model, "--text", text, "--context", 5000, "--facts", 0],
            "tiny: expected at most 4096 tokens, the positions of the model, got 5256",
        ),
        (["eval", "--model", model, "--text", short], "text: expected at least 1280 tokens"),
        (["eval", "--json", tmp_path / "no" / "x.json"], "x.json: expected a file in a folder"),
        (["demo", "--plot", tmp_path], "expected a file in a folder that can be written to"),
        (["eval", "--recipe", "best"], "argument --recipe: invalid choice: 'best'"),
        (["eval", "--context", "1"], "argument --context: expected at least 2, got 1"),
        (["eval", "--facts", "33"], "argument --facts: invalid choice"),
        (["frobnicate"], "invalid choice: 'frobnicate'"),
        ([], "the following arguments are required: COMMAND"),
    ):
        one_line_and_code_2(run(capsys, *argv), message)


def one_line_and_code_2(result, message):
    code, _, error = result
    assert code == 2
    assert message in error
    assert error.startswith("kvcompress")
    assert error.count("\n") == 1
    assert "Traceback" not in error


def test_a_missing_package_is_named(capsys, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "rich.console", None)
    monkeypatch.setitem(sys.modules, "rich", None)
    one_line_and_code_2(run(capsys, "eval"), "is not installed: pip install 'kvcompress-jax[demo]'")


def test_help(capsys):
    code, out, _ = run(capsys, "--help")
    assert code == 0 and "demo" in out and "eval" in out
