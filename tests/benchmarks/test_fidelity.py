"""The README's main table comes out of one command, here on a tiny model."""

import json

import pytest

from benchmarks import fidelity
from tests.lab.small import TEXT, write_small_model


def test_rows_are_what_was_evaluated(tmp_path, capsys):
    model = write_small_model(tmp_path / "tiny")
    text = tmp_path / "prose.txt"
    text.write_text(TEXT)
    arguments = ["--model", str(model), "--recipes", "compact", "--context", "256"]
    arguments += ["--continuation", "16", "--facts", "0", "--json", str(tmp_path / "all.json")]
    fidelity.main([str(text), *arguments])
    head, line, row = capsys.readouterr().out.splitlines()
    assert head.count("|") == line.count("|") == row.count("|")
    found = json.loads((tmp_path / "all.json").read_text())["`compact`"]["prose"]
    cells = [cell.strip() for cell in row.split("|")[1:-1]]
    assert cells[:2] == ["`compact`", "prose"] and cells[-1] == "-"
    assert float(cells[2]) == pytest.approx(found["effective_bits"], abs=0.005)
    assert float(cells[5]) == pytest.approx(found["kl_mean"], abs=5e-6)
    assert found["kl_mean"] > 0
