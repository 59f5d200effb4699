"""`kvcompress tune` and the quality gate, as a user meets them."""

import dataclasses
import json
import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kvcompress_jax.calibrated.calibrate import calibrate, gather
from kvcompress_jax.calibrated.profile import save_profile
from kvcompress_jax.cli import main
from kvcompress_jax.config import RECIPES, CompressionConfig
from kvcompress_jax.interop.vllm import gate
from kvcompress_jax.lab.budget import bits_for_code, sequence_bits, sequence_bytes
from kvcompress_jax.lab.methods.base import Context
from kvcompress_jax.lab.methods.embedded import Embedded
from kvcompress_jax.lab.outliers import with_outlier_keys
from kvcompress_jax.lab.tune import Goal, Tuner
from kvcompress_jax.models.cache_settings import cache_layout
from kvcompress_jax.models.load import load_model
from kvcompress_jax.models.runner import make_runner
from kvcompress_jax.quality import QualityBound, QualityError
from tests.lab.small import TEXT, write_small_model
from tests.models.tiny import CONFIGS

SIZES = {"context_tokens": 256, "continuation_tokens": 32}
ARGUMENTS = ("--context", 256, "--continuation", 32, "--length", 1024)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tune")
    text = folder / "text.txt"
    text.write_text(TEXT)
    return write_small_model(folder / "tiny"), text, write_small_model(folder / "other", "qwen2")


def run(capsys, *argv):
    try:
        code = main([str(a) for a in argv])
    except SystemExit as e:
        code = e.code
    out = capsys.readouterr()
    return code, out.out, out.err


@pytest.mark.parametrize("recipe", [*RECIPES, "floors"])
def test_predicted_bytes_are_those_of_the_bench(recipe):
    """Which are those of the cache (`tests/lab/test_replay.py`)."""
    config = CONFIGS["llama"]
    compression = CompressionConfig(seal_level=2, floor_layers=(0, -1))
    compression = dataclasses.replace(RECIPES.get(recipe, compression), page_size=32)
    for tokens in (20, 256, 1024):
        shape = (config.num_layers, tokens, config.num_kv_heads, config.head_dim)
        x = jax.ShapeDtypeStruct(shape, jnp.float32)
        window = compression.window_tokens
        context = Context(x, x, x, x, config, compression.sink_tokens, window, "bfloat16")
        rows = np.full(config.num_layers, compression.fine_rows)
        if compression.seal_level == 2:
            rows[[i for i in range(len(rows)) if recipe != "floors" or 0 < i < len(rows) - 1]] = 0
        layout = cache_layout(config, compression, "bfloat16")
        if tokens > 32:
            stored = Embedded(config=compression).stored_bits(context, rows)
            assert 8 * sequence_bytes(layout, compression, tokens) == stored
        assert sequence_bytes(layout, compression, tokens + 32) > sequence_bytes(
            layout, compression, tokens
        )


def test_bits_for_code_are_what_is_left(files):
    model = load_model(files[0])
    config = CompressionConfig(seal_level=2)
    layout = cache_layout(model.config, config, "bfloat16")
    bits = sequence_bits(layout, config, 2048)
    assert np.isclose(
        bits_for_code(layout, config, 2048, bits=bits),
        layout.effective_bits(sealed_pages=1, fine_chunks=0),
    )
    assert bits_for_code(layout, config, 60, bits=16) == 0


def test_the_tuner_keeps_its_budget_and_more_bits_keep_more(files):
    """What it says of a configuration is what the bench says; a refined layer gains."""
    model = load_model(files[0])
    bound = QualityBound(kl=10.0)
    tuner = Tuner(model, {"text": TEXT}, **SIZES)
    found = {}
    for bits in (6.0, 8.0):
        found[bits] = tuner.tune(Goal(bound=bound, bits=bits, length_tokens=1024))
        best = found[bits].tried[0]
        assert best.bits <= bits and len(found[bits].gains) == model.config.num_layers
        assert all(best.kl <= other.kl for other in found[bits].tried)
    assert found[8.0].tried[0].kl < found[6.0].tried[0].kl
    least = tuner.tune(Goal(bound=bound, length_tokens=1024))
    assert least.bits == min(t.bits for t in least.tried) < found[6.0].bits
    layers = [t.config.floor_layers for t in found[6.0].tried if t.config.floor_layers]
    most = int(np.argmax(found[6.0].gains))
    assert layers and all(most in floors for floors in layers)
    config = found[8.0].config
    assert config.bound == bound and config.measured.fingerprint == model.fingerprint
    # The bench and the paged cache run the same code on the same numbers.
    assert 0.5 < config.measured.kl / found[8.0].tried[0].kl < 2


def test_tune_writes_what_eval_takes_and_refuses_what_it_cannot_do(files, tmp_path, capsys):
    """kvcompress tune --model DIR ... --out FILE.toml, then the gate."""
    model, text, _ = files
    out, report = tmp_path / "tuned.toml", tmp_path / "tuned.json"
    tune = ("tune", "--model", model, "--text", text, *ARGUMENTS, "--out", out)
    code, shown, error = run(capsys, *tune, "--kl", 1, "--top1", 0.1, "--json", report)
    assert (code, error) == (0, "") and "Tried, best first" in shown
    config = CompressionConfig.from_toml(out)
    written = json.loads(report.read_text())
    assert written["config"]["measured"]["kl"] == config.measured.kl
    assert config == CompressionConfig.from_env({"KVCOMPRESS_CONFIG": str(out)})
    # Within a loose bound it takes the least there is.
    assert written["bits"] == min(t["bits"] for t in written["tried"])

    strict = tmp_path / "strict.toml"
    code, _, error = run(capsys, *tune[:-1], strict, "--kl", 1e-12, "--json", report)
    assert code == 3 and "kl: expected at most 1e-12 nats per token, got" in error
    assert error.count("\n") == 1 and not strict.exists()
    assert "kl: expected at most" in json.loads(report.read_text())["refused"]
    code, _, error = run(capsys, *tune[:-1], strict, "--bits", 3)
    assert code == 3 and "bits: expected at least" in error and not strict.exists()
    for extra, message in (
        ((), "expected --bits, --bytes, --kl, --top1 or --check"),
        (("--bytes", "1 parsec"), "expected a number of bytes"),
        (("--kl", "0.1", "--calibrate"), "--calibrate: expected --bits or --bytes"),
        (("--kl", "-1"), "kl: expected a number of nats, at least 0, got -1"),
        (("--bits", "5", "--check", out), "--check: expected no budget"),
    ):
        code, _, error = run(capsys, *tune[:-1], strict, *extra)
        assert code == 2 and message in error, error


def test_the_gate(files, tmp_path, capsys, caplog):
    """Measured elsewhere, changed since, not kept: refused; forced: logged."""
    model, text, other = files
    loose, tight = tmp_path / "loose.toml", tmp_path / "tight.toml"
    head = "page_size = 16\nwindow_tokens = 16\nseal_level = 2\n[bound]\n"
    loose.write_text(head + "kl = 5.0\n")
    tight.write_text(head + "kl = 1e-9\n")
    loaded = load_model(model)

    def start(config, model=loaded):
        return make_runner(model, config, tokens=64, max_sequences=1, chunk_tokens=32)

    unknown = CompressionConfig.from_toml(loose)
    with pytest.raises(QualityError, match="has a bound, but it was never measured; `kvcom"):
        start(unknown)
    checked = tmp_path / "checked.toml"
    check = ("tune", "--model", model, "--text", text, *ARGUMENTS, "--check", loose)
    assert run(capsys, *check, "--out", checked)[0] == 0
    config = CompressionConfig.from_toml(checked)
    start(config)
    with pytest.raises(QualityError, match="measured on another model"):
        start(config, load_model(other))
    with pytest.raises(QualityError, match="changed since it was measured"):
        start(dataclasses.replace(config, sink_tokens=0))
    start(dataclasses.replace(config, host_bytes=1 << 20))  # fidelity does not depend on it
    worse = dataclasses.replace(config.measured, kl=6.0)
    with pytest.raises(QualityError, match=r"kl: expected at most 5 nats .* got 6\.0"):
        start(dataclasses.replace(config, measured=worse))
    with pytest.raises(QualityError, match="kl: expected at most 5"):
        start(dataclasses.replace(config, measured=dataclasses.replace(worse, kl=float("nan"))))
    with caplog.at_level(logging.WARNING, logger="kvcompress_jax.quality"):
        start(dataclasses.replace(config, measured=worse, force=True))
    assert "quality gate, forced: the configuration kl: expected at most 5" in caplog.text

    # eval measures first, on another text, what was never measured on its model.
    evaluate = ("eval", "--model", other, "--text", text, "--facts", 0)
    evaluate += ("--context", 64, "--continuation", 16, "--config")
    code, _, error = run(capsys, *evaluate, tight)
    assert code == 3 and error.count("\n") == 1
    assert "kl: expected at most 1e-09" in error and "language reference" in error
    assert run(capsys, *evaluate, tight, "--force")[0] == 0


def test_a_profile_of_a_model_without_outlier_keys_ruins_one_with_them(files, tmp_path, capsys):
    """The gate sees what a fingerprint made to fit hides; the tuner finds what does no harm."""
    model, text, _ = files
    loaded = load_model(model)
    tokens = loaded.tokenizer.encode(TEXT)[2000:2400]
    profile = calibrate(loaded, gather(loaded, [tokens]), bits=4.0)
    disguised = dataclasses.replace(profile, fingerprint=with_outlier_keys(loaded).fingerprint)
    for name, each in (("own", profile), ("disguised", disguised)):
        save_profile(tmp_path / f"{name}.safetensors", each)
        (tmp_path / f"{name}.toml").write_text(
            f'profile = "{name}.safetensors"\n[bound]\nkl = 0.02\n'
        )
    tune = ("tune", "--model", model, "--text", text, *ARGUMENTS, "--out", tmp_path / "out.toml")
    assert run(capsys, *tune, "--check", tmp_path / "own.toml")[0] == 0
    # vLLM takes what was measured as it does it.
    served = run(capsys, *tune, "--check", tmp_path / "own.toml", "--for-vllm")
    assert served[0] == 0
    own = CompressionConfig.from_toml(tmp_path / "out.toml")
    assert own.profile is not None and own.error_feedback is False
    gate.check(own, str(model))
    harder = (*tune, "--outlier-keys")
    code, _, error = run(capsys, *harder, "--check", tmp_path / "disguised.toml")
    assert code == 3 and "disguised.toml: kl: expected at most 0.02 nats per token, got" in error
    assert run(capsys, *harder, "--kl", 0.02, "--top1", 0.5, "--for-vllm")[0] == 0
    found = CompressionConfig.from_toml(tmp_path / "out.toml")
    assert found.error_feedback is False  # as inside vLLM
    assert found.measured.kl < 0.02 and found.measured.model.endswith("outlier keys")
