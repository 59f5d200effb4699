"""One command makes the published leaderboard, here of a tiny model."""

import json

from benchmarks import leaderboard
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
