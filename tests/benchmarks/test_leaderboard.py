"""One command makes the published leaderboard, here of a tiny model."""

import json

import pytest

from benchmarks import leaderboard
from kvcompress_jax.lab.bench import Bench
from kvcompress_jax.lab.leaderboard import OtherLeaderboardError
from kvcompress_jax.lab.methods.base import UNCOMPRESSED
from tests.lab.small import TEXT, write_small_model


def test_rounds_make_one_leaderboard(tmp_path):
    model = write_small_model(tmp_path / "tiny")
    files = [tmp_path / f"{name}.txt" for name in ("prose", "code")]
    for file, text in zip(files, (TEXT, TEXT[::-1]), strict=True):
        file.write_text(text)
    leaderboard.main(
        [
            *map(str, files),
            *("--model", str(model), "--out", str(tmp_path), "--codes", "embedded"),
            *("--evictions", "evict-h2o", "--context", "256", "--continuation", "16"),
            *("--facts", "0", "--bits", "8", "4.5"),
        ]
    )
    text = (tmp_path / "leaderboard.md").read_text()
    assert "python benchmarks/leaderboard.py prose.txt code.txt --model tiny" in text
    assert str(tmp_path) not in text
    assert (tmp_path / "leaderboard.png").stat().st_size > 10_000
    results = json.loads((tmp_path / "leaderboard.json").read_text())["results"]
    measured = {(r["model"], r["method"], r["target_bits"]) for r in results}
    plain, outliers = sorted({r["model"] for r in results})
    assert outliers == f"{plain}, outlier keys"
    expected = {(plain, "embedded", bits) for bits in (8.0, 4.5)}
    expected |= {(plain, "evict-h2o", bits) for bits in (8.0, 4.5)}
    expected |= {(outliers, "embedded", 4.5)}
    expected |= {(m, "uncompressed", None) for m in (plain, outliers)}
    assert measured == expected
    assert len(results) == 2 * len(expected)  # each text once


def test_a_method_is_added_to_a_leaderboard(tmp_path, monkeypatch):
    model, text = write_small_model(tmp_path / "tiny"), tmp_path / "prose.txt"
    text.write_text(TEXT)
    measured = []
    measure = Bench.measure

    def spied(bench, method):
        if method != UNCOMPRESSED:
            measured.append(method)
        return measure(bench, method)

    monkeypatch.setattr(Bench, "measure", spied)

    def run(*methods, context="128", more=()):
        measured.clear()
        sizes = ("--context", context, "--continuation", "16", "--facts", "2", "--bits", "4.5")
        where = (str(text), "--model", str(model), "--out", str(tmp_path), *sizes)
        leaderboard.main([*where, "--rounds", "codes", "--codes", *methods, *more])
        return json.loads((tmp_path / "leaderboard.json").read_text())

    first = run("embedded")
    assert len(measured) == 1
    both = run("embedded", "kivi", more=["--resume"])
    assert len(measured) == 1
    assert both["results"][:2] == first["results"]
    assert [r["method"] for r in both["results"]] == ["uncompressed", "embedded", "kivi"]
    assert "--resume" not in both["command"]
    assert both["results"] == run("embedded", "kivi")["results"]  # as if measured at once
    assert len(measured) == 2
    assert run("embedded", "kivi", more=["--resume"]) == both and not measured
    assert run("kivi", more=["--resume"])["results"] == [both["results"][i] for i in (0, 2)]
    assert not measured
    with pytest.raises(OtherLeaderboardError, match=r"leaderboard.json: sizes: expected .*64"):
        run("embedded", context="64", more=["--resume"])
    text.write_text(TEXT + "!")
    with pytest.raises(OtherLeaderboardError, match=r"leaderboard.json: texts: expected"):
        run("embedded", more=["--resume"])
    (tmp_path / "leaderboard.json").unlink()
    with pytest.raises(OtherLeaderboardError, match="expected a leaderboard in JSON, got: FileNot"):
        run("embedded", more=["--resume"])
