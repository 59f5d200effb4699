"""`kvcompress calibrate`, and what its profile does to `kvcompress eval`."""

import json

import pytest

from kvcompress_jax.cli import main
from kvcompress_jax.lab.texts import HELD_OUT, hold_out
from tests.lab.small import TEXT, write_small_model


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("calibrate")
    text = folder / "text.txt"
    text.write_text(TEXT)
    config = folder / "config.toml"
    config.write_text("page_size = 16\nwindow_tokens = 16\n")
    return write_small_model(folder / "tiny"), text, config, folder / "profile.safetensors"


def run(*argv):
    try:
        return main([str(a) for a in argv])
    except SystemExit as e:
        return e.code


@pytest.mark.first
def test_calibrate_and_eval(files, tmp_path, capsys):
    model, text, config, profile = files
    few = ("--samples", 2, "--sample-tokens", 256, "--page-size", 16)
    calibrate = ("calibrate", "--model", model, "--text", text, *few)
    assert run(*calibrate, "--bits", 5, "--out", profile) == 0
    assert "bits for keys" in capsys.readouterr().out
    evaluate = ("eval", "--model", model, "--text", text, "--config", config, "--facts", 0)
    evaluate += ("--context", 400, "--continuation", 32, "--json")
    results = []
    for extra in (("--profile", profile), ()):
        out = tmp_path / "out.json"
        assert run(*evaluate, out, *extra) == 0
        results.append(json.loads(out.read_text()))
    assert 4 < results[0]["effective_bits"] <= 5 < results[1]["effective_bits"]
    assert results[0]["config"]["profile"] == str(profile)
    assert 0 < results[0]["kl_mean"] < 1 and results[0]["value_cosine"] > 0.9
    capsys.readouterr()

    wrong = [
        ((*calibrate, "--bits", 1, "--out", profile), "bits: expected more for this model, got 1"),
        ((*calibrate, "--bits", 5, "--out", tmp_path / "no" / "x"), "no"),
        ((*evaluate, tmp_path / "x", "--profile", text), "expected a profile of `kvcompress"),
        ((*calibrate, "--bits", 5, "--samples", 900, "--out", profile), "text: expected at least"),
    ]
    for argv, message in wrong:
        assert run(*argv) == 2
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1

    other = write_small_model(tmp_path / "other", "qwen2")
    argv = ["eval", "--model", other, "--text", text, "--config", config, "--profile", profile]
    assert run(*argv, "--facts", 0, "--context", 64, "--continuation", 16) == 2
    assert "expected a profile of this model" in capsys.readouterr().err


@pytest.mark.parametrize("count", [2, 3, 5, 9])
def test_what_judges_a_code_is_not_what_it_was_fitted_to(count):
    samples = [[i] for i in range(count)]
    fitted, apart = hold_out(samples)
    assert sorted(fitted + apart) == samples
    assert len(apart) == min(HELD_OUT, count // 2)
    assert samples[0] in fitted and apart[0] == [1]
