"""The README's table of learned scores comes out of one command, here on a tiny model."""

import functools
import json

import numpy as np
import pytest

from benchmarks import importance
from kvcompress_jax.lab import importance_data
from tests.lab.small import TEXT, write_small_model


def test_rows_are_what_was_measured(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(importance_data, "SEQUENCE_TOKENS", 512)
    monkeypatch.setattr(
        importance, "train_importance", functools.partial(importance.train_importance, steps=3)
    )
    model, out = write_small_model(tmp_path / "tiny"), tmp_path / "all.json"
    text = tmp_path / "text.txt"
    text.write_text(TEXT)
    arguments = ["--model", str(model), "--context", "192", "--continuation", "32", "--parts", "2"]
    arguments += ["--train-tokens", "512", "--magnitudes", "output_error", "--ratios", "0.25"]
    importance.main([str(text), *arguments, "--json", str(out)])
    found = json.loads(out.read_text())["kl"]
    ours, none, learned, oracle = (
        found[f"{name}, ratio 0.25"][0]
        for name in (
            "output_error",
            "nobody refined (compact)",
            "output_error, learned from text.txt",
            "output_error, oracle",
        )
    )
    assert len(found) == 4 and all(len(kl) == 2 for kl in (ours, none, learned, oracle))
    assert max(ours) < min(none)
    assert len({tuple(ours), tuple(learned), tuple(oracle)}) == 3
    printed = capsys.readouterr().out
    for kl in (ours, none, learned, oracle):
        assert f"{1e4 * np.exp(np.mean(np.log(kl))):.2f}" in printed


def test_a_ratio_without_an_order_is_refused(tmp_path, capsys):
    with pytest.raises(SystemExit):
        importance.main([str(tmp_path / "text.txt"), "--ratios", "0.25", "0.5"])
    assert "0.5 has 6 bits for all tokens, and no order" in capsys.readouterr().err


def test_a_short_text_is_refused(tmp_path, capsys):
    text = tmp_path / "text.txt"
    text.write_text(TEXT[:500])
    with pytest.raises(SystemExit):
        importance.main([str(text), "--model", str(write_small_model(tmp_path / "tiny"))])
    assert "expected at least 2560 tokens" in capsys.readouterr().err
