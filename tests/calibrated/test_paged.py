"""The calibrated code inside the paged cache, from calibration to attention."""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kvcompress_jax.calibrated.calibrate import calibrate, gather
from kvcompress_jax.calibrated.profile import ProfileError, load_profile, save_profile
from kvcompress_jax.config import CompressionConfig, ConfigError
from kvcompress_jax.manager import KVCacheManager
from kvcompress_jax.models.dense import dense_forward
from kvcompress_jax.models.runner import make_runner
from kvcompress_jax.paged import PoolSizes, append, attend, init_cache, read_pages
from tests.calibrated.synthetic import frequencies, make_profile
from tests.models.tiny import CONFIGS, random_tokens, tiny_model
from tests.paged.batch import poison, reference_attention

CONFIG = CompressionConfig(page_size=16, window_tokens=16, sink_tokens=2, profile="a file")


# Biases; windows, two ropes and normalised heads: each takes its minute.
@pytest.fixture(scope="module", params=["qwen2", "gemma3"])
def calibrated(request, tmp_path_factory):
    model = tiny_model(CONFIGS[request.param])
    samples = [random_tokens(model.config, 128, seed=s) for s in (1, 2)]
    profile = calibrate(model, gather(model, samples, page_size=16, sink_tokens=2), bits=5.0)
    path = tmp_path_factory.mktemp("profile") / "profile.safetensors"
    save_profile(path, profile)
    return model, str(path)


def test_a_model_reads_on_from_calibrated_pages(calibrated):
    model, path = calibrated
    tokens = random_tokens(model.config, 200, seed=7)
    want = np.asarray(dense_forward(model.params, model.config, jnp.array([tokens], jnp.int32))[0])
    config = dataclasses.replace(CONFIG, profile=path, telemetry_share=1.0, telemetry_pages=16)
    runner = make_runner(
        model, config, tokens=400, max_sequences=2, chunk_tokens=16, kv_dtype="float32"
    )
    sequence = runner.manager.add()
    got = np.asarray(runner.extend(sequence, tokens, all_logits=True))
    runner.advance()
    stats = runner.manager.get_compression_stats()
    runner.manager.verify(runner.cache)
    assert stats["pages_level_3"] == 200 // 16 - 1 and stats["pages_level_2"] == 0
    assert stats["effective_bits"] <= 5.0
    assert stats["telemetry_samples"] > 0 and 1e-5 < stats["telemetry_output_error_mean"] < 0.5
    spread = want.std()
    error = np.abs(got - want)[40:].mean()
    assert 1e-5 < error / spread < 0.2
    # Turned to a wrong place, the keys are of no use.
    moved = dataclasses.replace(runner.cache, first=runner.cache.first + 5)
    fork = runner.manager.fork(sequence)
    runner.cache = moved
    far = np.asarray(runner.extend(fork, tokens[:8], all_logits=True))
    runner.cache = dataclasses.replace(runner.cache, first=runner.cache.first - 5)
    runner.manager.free(fork)
    again = runner.manager.fork(sequence)
    near = np.asarray(runner.extend(again, tokens[:8], all_logits=True))
    assert np.abs(far - near).mean() > 1e-6


def test_profile_of_another_model_or_none(calibrated, tmp_path):
    model, path = calibrated
    with pytest.raises(ProfileError, match=r"expected a profile of this model \(other\), got one"):
        load_profile(path, model.config, "other")
    with pytest.raises(ProfileError, match="expected a profile of `kvcompress calibrate`"):
        load_profile(tmp_path / "none", model.config, "tiny")
    damaged = tmp_path / "damaged"
    damaged.write_bytes(Path(path).read_bytes()[:-100])
    with pytest.raises(ProfileError, match="expected a profile of `kvcompress calibrate`"):
        load_profile(damaged, model.config, "tiny")
    narrow = dataclasses.replace(model.config, num_layers=1, layer_windows=(0,))
    with pytest.raises(ProfileError, match="mean: expected finite"):
        load_profile(path, narrow, "tiny")
    with pytest.raises(ProfileError, match=r"bits: expected more for this model, got 1"):
        calibrate(
            model, gather(model, [random_tokens(model.config, 64, seed=0)], page_size=16), bits=1
        )
    with pytest.raises(ProfileError, match="samples of at least 32 tokens, got 20"):
        gather(model, [random_tokens(model.config, 20, seed=0)], page_size=16)
    with pytest.raises(ProfileError, match="not writable"):
        save_profile(tmp_path / "no" / "such" / "folder", load_profile(path, model.config, "tiny"))
    with pytest.raises(ConfigError, match="floor_layers: expected none with a profile"):
        CompressionConfig(profile=path, floor_layers=(0,))


@pytest.fixture
def batch():
    """Three sequences of random tokens over a synthetic profile; everything unused poisoned."""
    profile, keys = make_profile(layers=2, heads=2, dim=64)
    layout = CONFIG.layout(layers=2, kv_heads=2, head_dim=64, dtype="float32", rows=profile.rows)
    code = profile.code(jnp.asarray(frequencies(2, 64)))
    sizes = PoolSizes(raw_pages=12, sealed_pages=12, fine_chunks=0, sink_slots=4)
    manager = KVCacheManager(layout, sizes, CONFIG, max_sequences=4)
    cache = poison(dataclasses.replace(init_cache(layout, sizes, code), code=None))
    cache = dataclasses.replace(cache, code=code)
    rng = np.random.default_rng(0)
    ids = []
    for length in (70, 16, 33):
        ids.append(manager.add())
        at = rng.integers(0, 1400)
        k = np.swapaxes(keys[:, at : at + length], 0, 1).astype(np.float32)
        v = rng.normal(size=k.shape).astype(np.float32)
        slots = manager.append_slots(ids[-1], length)
        for layer in range(2):
            cache = append(cache, layer, jnp.asarray(k), jnp.asarray(v), slots)
    return manager, manager.advance(cache), ids


def tokens_of(cache, table, row, layer):
    """Positions, keys and values of a row, from `read_pages`, sinks and raw pages."""
    parts = []
    for c in range(int(table.sealed_count[row])):
        index = int(table.sealed_index[row, c])
        k, v = (np.array(x, np.float64) for x in read_pages(cache, layer, table.sealed[row, c]))
        if index == 0:
            k[:, :2], v[:, :2] = np.asarray(cache.sinks[layer, table.sink[row]], np.float64)
        parts.append((index * 16, k, v))
    for c in range(int(table.raw_count[row])):
        first = int(table.raw_index[row, c]) * 16
        kv = np.asarray(cache.raw[layer, int(table.raw[row, c])], np.float64)
        kv = kv[:, :, : int(table.length[row]) - first]
        parts.append((first, kv[0], kv[1]))
    position = np.concatenate([p + np.arange(k.shape[1]) for p, k, _ in parts])
    keys, values = (np.concatenate([p[i] for p in parts], 1).transpose(1, 0, 2) for i in (1, 2))
    return position, keys, values


@pytest.mark.parametrize("window", [None, 20])
def test_attention_reads_calibrated_pages(batch, window):
    manager, cache, ids = batch
    table = manager.table(ids)
    q = jax.random.normal(jax.random.key(0), (3, 1, 4, 64))
    out, lse, mass = attend(q, cache, 1, table, window=window, return_mass=True)
    for row in range(3):
        position, keys, values = tokens_of(cache, table, row, 1)
        want, want_lse, weights = reference_attention(
            q[row],
            position,
            keys,
            values,
            int(table.length[row]) - 1,
            scale=0.125,
            window=window or 0,
        )
        # Logits of several hundred here: float32 keeps them to 1e-4.
        assert np.abs(lse[row] - want_lse).max() < 2e-6 * np.abs(want_lse).max() + 1e-5
        assert np.abs(out[row] - want).max() < 5e-4
        assert np.abs(out[row] - want[:, ::-1]).max() > 0.1
        if table.sealed_count[row]:
            first = (
                (position >= 2) & (position < 16) if int(table.sealed_index[row, 0]) == 0 else None
            )
            got = np.asarray(mass.sealed)[row, :, 0]
            assert np.allclose(got, weights[0][:, first].sum(-1).reshape(2, 2).sum(-1), atol=5e-4)


def test_pages_move_and_come_back_with_their_place(batch):
    manager, cache, ids = batch
    table = manager.table(ids)
    before = tokens_of(cache, table, 0, 0)
    manager.preempt(ids[0], cache)
    cache = manager.advance(cache)
    other = manager.add()  # takes the pages that became free
    manager.append_slots(other, 16)
    cache = manager.resume(ids[0], cache)
    manager.verify(cache)
    after = tokens_of(cache, manager.table(ids), 0, 0)
    for a, b in zip(before, after, strict=True):
        assert np.array_equal(a, b)


def test_values_that_are_too_large_stay_at_level_0(batch, caplog):
    manager, cache, _ = batch
    new = manager.add()
    slots = manager.append_slots(new, 40)
    huge = jnp.ones((40, 2, 64)).at[3, 1, 5].set(1e30)
    for layer in range(2):
        cache = append(cache, layer, jnp.ones((40, 2, 64)), huge, slots)
    cache = manager.advance(cache)
    assert manager.get_compression_stats()["rejected"] == 1
    assert "expected values that a calibrated code can hold" in caplog.text
    manager.verify(cache)


def test_cache_and_code_belong_together():
    profile, _ = make_profile()
    layout = CONFIG.layout(layers=1, kv_heads=2, head_dim=64, rows=profile.rows)
    sizes = PoolSizes(raw_pages=2, sealed_pages=2, fine_chunks=0, sink_slots=1)
    with pytest.raises(ValueError, match="code: expected a calibrated code for a layout"):
        init_cache(layout, sizes)
    with pytest.raises(ValueError, match="code: expected none for a layout"):
        init_cache(
            dataclasses.replace(layout, rows=None),
            sizes,
            profile.code(jnp.asarray(frequencies(1, 64))),
        )
