"""The calibrated code on the bench is that of the paged cache."""

import dataclasses

import numpy as np
import pytest

from kvcompress_jax.calibrated.calibrate import calibrate, gather
from kvcompress_jax.calibrated.profile import ProfileError, read_origin, save_profile
from kvcompress_jax.config import CompressionConfig
from kvcompress_jax.lab.bench import compress
from kvcompress_jax.lab.methods.base import bits_per_value
from kvcompress_jax.lab.methods.calibrated import Calibrated
from kvcompress_jax.lab.methods.registry import METHODS, Wanted
from kvcompress_jax.lab.replay import capture
from kvcompress_jax.models.runner import make_runner
from kvcompress_jax.paged import read_pages
from tests.models.tiny import CONFIGS, random_tokens, tiny_model


def test_bench_and_cache_agree(tmp_path):
    model = tiny_model(CONFIGS["llama"])
    tokens = random_tokens(model.config, 200, seed=3)
    path = str(tmp_path / "profile.safetensors")
    save_profile(path, calibrate(model, gather(model, [tokens], page_size=16), bits=5.0))
    context = capture(model, tokens, sinks=4, window=0, kv_dtype="float32")
    method = Calibrated(profile=path, fingerprint=model.fingerprint, page_size=16)
    found = compress(method, context)

    config = CompressionConfig(profile=path, page_size=16, window_tokens=0)
    runner = make_runner(
        model, config, tokens=256, max_sequences=1, chunk_tokens=200, kv_dtype="float32"
    )
    sequence = runner.manager.add()
    runner.extend(sequence, tokens)
    runner.advance()
    table = runner.manager.table([sequence])
    count = int(table.sealed_count[0])
    assert count == 200 // 16
    effective = runner.manager.get_compression_stats()["effective_bits"]
    pages = 12 * 16
    exact = (4 + 8) * 32 / 200
    assert abs(bits_per_value(found) - (effective * pages / 200 + exact)) < 0.1
    for layer in range(3):
        for want, got in zip(
            read_pages(runner.cache, layer, table.sealed[0, :count]),
            (found.keys, found.values),
            strict=True,
        ):
            want = np.moveaxis(np.asarray(want), 1, 2).reshape(pages, *got.shape[2:])[4:]
            got = np.asarray(got[layer, 4:pages])
            # Which token of a page is refined depends on which queries were looked at.
            same = np.abs(got - want).max(-1) <= 1e-4 * np.abs(want).max()
            assert same.mean() > 0.85
            assert (np.abs(got[1:] - want[:-1]).max(-1) <= 1e-4 * np.abs(want).max()).mean() < 0.1


def test_only_whole_contexts(tmp_path):
    model = tiny_model(CONFIGS["llama"])
    context = capture(model, [1] * 40, sinks=4, window=0, kv_dtype="float32")
    method = Calibrated(profile=str(tmp_path / "none"), fingerprint="tiny")
    with pytest.raises(ValueError, match="context: expected tokens at positions 0, 1"):
        method(dataclasses.replace(context, gathered=True))


def test_the_profile_for_a_rate():
    profiles = (("a", 2.5), ("b", 3.5), ("c", 4.44))

    def chosen(bits):
        method = METHODS["calibrated"](Wanted(bits=bits, fingerprint="x", profiles=profiles))
        return method and method.profile

    assert [chosen(b) for b in (2.5, 3.4, 3.5, 4.5, 4.2, 8.0)] == ["a", None, "b", "c", None, None]
    assert METHODS["calibrated"](Wanted(bits=2.5)) is None


def test_origin_of_a_file_that_is_no_profile(tmp_path):
    path = tmp_path / "text"
    path.write_text("no profile")
    with pytest.raises(ProfileError, match="text: expected a profile of `kvcompress calibrate`"):
        read_origin(path)
