"""`make vllm-fidelity`, on few tokens."""

import json
from pydoc_data.topics import topics

import pytest

from benchmarks.in_vllm import fidelity


def test_a_table_of_perplexity_and_capacity(model, tmp_path, capsys, monkeypatch):
    report = tmp_path / "report.json"
    text = tmp_path / "text.txt"
    text.write_text(topics["import"])
    few = [str(model), str(text), "--prompts", "1", "--tokens", "300"]
    fidelity.main([*few, "--only", "compact", "--json", str(report)])
    found = json.loads(report.read_text())
    stock, compact = found["vLLM"], found["compact"]
    assert len(stock["losses"]) == len(compact["losses"]) == 299
    assert compact["capacity"] > 6 * stock["capacity"] and 4.5 < compact["bits"] < 4.7
    # A chunk of 256 tokens is attended to as it is, and compressed for the next one.
    far = [abs(a - b) for a, b in zip(stock["losses"], compact["losses"], strict=True)]
    assert max(far[:255]) < 1e-4 < max(far[256:]) < 1
    shown = capsys.readouterr().out
    assert "compact" in shown and f"{compact['capacity']:,}" in shown
    # A configuration that cannot run is no row that is missing.
    monkeypatch.setitem(fidelity.CONFIGURATIONS, "compact", {"KVCOMPRESS_RECIPE": "none"})
    with pytest.raises(RuntimeError, match="compact: no result"):
        fidelity.main([*few, "--only", "compact"])
