"""`kvcompress compare`, as a user meets it."""

import json

from kvcompress_jax.cli import main
from kvcompress_jax.config import RECIPES
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


def test_parts_of_a_text_and_another_cache(tmp_path, capsys):
    model, text, out = write_small_model(tmp_path / "tiny"), tmp_path / "prose.txt", tmp_path / "o"
    text.write_text(TEXT)
    arguments = ["compare", "--model", str(model), "--text", str(text), "--out", str(out)]
    arguments += ["--methods", "kivi", "--bits", "8.5", "--context", "128", "--continuation", "16"]
    arguments += ["--facts", "0", "--parts", "2"]
    bits = {}
    for dtype in ("bfloat16", "float32"):
        assert main([*arguments, "--kv-dtype", dtype]) == 0
        results = json.loads((out / "leaderboard.json").read_text())["results"]
        assert [r["text"] for r in results if r["method"] == "kivi"] == ["prose 1/2", "prose 2/2"]
        assert len({r["fidelity"]["kl_mean"] for r in results}) == 3  # 0 of the uncompressed twice
        bits[dtype] = results[-1]["fidelity"]["bits"]
    assert bits["float32"] > bits["bfloat16"]  # the exact tokens' bits
    assert main([*arguments, "--parts", "1000"]) == 2
    assert "expected at least 144 tokens" in capsys.readouterr().err


def test_both_ways_to_round_are_there_once():
    for bits in (8.5, 6.5, 4.5):
        ways = [
            METHODS[f"embedded{way}"](Wanted(bits=bits)) for way in ("", "-feedback", "-nearest")
        ]
        given = [way.config.feeds_errors_back for way in ways if way is not None]
        assert sorted(given) == [False, True]
        assert given[0] == (bits < 8)


def test_rates_between_the_recipes_refine_some_tokens():
    def config(name, bits):
        return METHODS[name](Wanted(bits=bits)).config

    assert config("embedded", 4.5) == RECIPES["compact"]
    assert config("embedded", 6.5) == RECIPES["balanced"]
    shares = [2 * config("embedded", bits).ratio for bits in (4.8, 5, 5.5, 6)]
    assert shares == sorted(set(shares)) and shares[0] > 0 and shares[-1] < 1
    for bits in (5, 5.5):
        six, eight, drawn = (
            config(name, bits)
            for name in ("embedded", "importance-output_error", "random-selection")
        )
        assert six == drawn and six.ratio == eight.ratio  # the same bytes
        assert (six.refining_bits, eight.refining_bits) == (2, 4)
    assert METHODS["random-selection"](Wanted(bits=4.5)) is None
