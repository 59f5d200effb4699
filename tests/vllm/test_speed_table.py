"""`make vllm-speed`, on few tokens."""

import json
from pydoc_data.topics import topics

import pytest

from benchmarks.in_vllm import speed


def test_a_table_of_times(model, tmp_path, capsys, monkeypatch):
    report, text = tmp_path / "report.json", tmp_path / "text.txt"
    text.write_text(topics["import"])
    few = [str(model), str(text), "--prompts", "2", "--tokens", "130", "--turns", "2"]
    speed.main([*few, "--only", "compact", "--json", str(report)])
    found = json.loads(report.read_text())
    assert list(found) == ["vLLM", "compact"]
    for seconds in found.values():
        assert len(seconds["prompts"]) == len(seconds["answers"]) == 2
        assert min(seconds["prompts"]) > 0
    assert "compact" in capsys.readouterr().out
    monkeypatch.setitem(speed.CONFIGURATIONS, "compact", {"KVCOMPRESS_RECIPE": "none"})
    with pytest.raises(RuntimeError, match="compact: no result"):
        speed.main([*few, "--only", "compact"])
