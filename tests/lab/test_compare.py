"""`kvcompress compare`, as a user meets it."""

import json

from kvcompress_jax.cli import main
from kvcompress_jax.importance import MAGNITUDES
from kvcompress_jax.lab.methods.registry import METHODS, Wanted, find_methods
from tests.lab.small import TEXT, write_small_model


def test_choices_of_tokens_beside_one_width(tmp_path, capsys):
    model, text, out = write_small_model(tmp_path / "tiny"), tmp_path / "prose.txt", tmp_path / "o"
    text.write_text(TEXT)
    arguments = ["compare", "--model", str(model), "--text", str(text), "--out", str(out)]
    arguments += ["--methods", "importance-key_norm,random-selection", "--bits", "6.5"]
    sizes = ["--context", "256", "--continuation", "16", "--facts", "0"]
    assert main([*arguments, *sizes]) == 0
    results = json.loads((out / "leaderboard.json").read_text())["results"]
    _, chosen, drawn = results
    assert [r["method"] for r in (chosen, drawn)] == ["importance-key_norm", "random-selection"]
    assert chosen["fidelity"]["bits"] == drawn["fidelity"]["bits"]  # matched
    assert chosen["fidelity"]["kl_mean"] != drawn["fidelity"]["kl_mean"]
    assert not (out / "retrieval-heat-map.png").exists()
    capsys.readouterr()


def test_a_group_of_names():
    found = find_methods("importances")
    assert set(found) == {"kivi", "random-selection", *(f"importance-{n}" for n in MAGNITUDES)}
    at = [METHODS[name](Wanted(bits=6.5)) for name in found]
    assert len(set(at)) == len(at) and None not in at


def test_names_that_do_not_exist(capsys):
    assert main(["compare", "--methods", "kivi,importance"]) == 2
    error = capsys.readouterr().err
    assert "methods: expected all, importances, calibrated" in error and "'importance'" in error
