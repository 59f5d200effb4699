"""Training data against float64, and that training learns what there is to learn."""

import dataclasses

import jax
import numpy as np
import pytest

from kvcompress_jax.cli import main
from kvcompress_jax.config import CompressionConfig
from kvcompress_jax.importance import ImportanceWeights
from kvcompress_jax.importance.learned import load_learned
from kvcompress_jax.lab import importance_data, train_importance
from kvcompress_jax.lab.importance_data import sample_pages
from kvcompress_jax.lab.texts import TextError
from kvcompress_jax.models.dense import capture_forward
from kvcompress_jax.models.load import load_model
from tests.lab.small import TEXT, write_small_model
from tests.models.tiny import CONFIGS, random_tokens, tiny_model

CONFIG = CompressionConfig(page_size=16)


def coarse(x, axis, where):
    """x at 4 bits with exact end points, scales as they are stored; float64."""
    from kvcompress_jax.codec import decode, encode, fit_scale

    scale = fit_scale(x, axis=axis, where=where)
    return np.asarray(decode(encode(x, scale, axis=axis)[0], scale, axis=axis), np.float64)


@pytest.mark.parametrize(("name", "layer"), [("llama", 2), ("gemma3", 1), ("gemma3", 2)])
def test_pages(name, layer, monkeypatch):
    """Mass and damage of a head of a layer, as sums over queries in float64."""
    monkeypatch.setattr(importance_data, "HORIZON_TOKENS", 8)
    importance_data._one_layer.clear_cache()
    model = tiny_model(CONFIGS[name])
    tokens = random_tokens(model.config, 120, seed=0)
    pages = sample_pages(
        model, tokens, page_size=16, sink_tokens=4, random=np.random.default_rng(0)
    )
    importance_data._one_layer.clear_cache()
    assert pages.keys.shape[:3] == (3, model.config.num_layers, 16)
    _, seen = capture_forward(model.params, model.config, np.array([tokens], np.int32))
    config = model.config
    group = config.num_heads // config.num_kv_heads
    head = config.num_kv_heads - 1
    q = np.asarray(seen.q, np.float64)[layer, 0][:, head * group : (head + 1) * group]
    k, v = (np.asarray(x, np.float64)[layer, 0][:, head] for x in (seen.k, seen.v))
    logits = np.einsum("tgd,sd->gts", q, k) * config.query_scale
    back = np.arange(120)[:, None] - np.arange(120)[None]
    window = config.layer_windows[layer]
    logits[:, (back < 0) | ((window > 0) & (back >= window))] = -np.inf
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    out = weights @ v
    for page in range(3):
        rows = slice(16 * page, 16 * page + 16)
        sealed_at = int(pages.seen[page, 0]) + 16 * page
        assert 16 * page + 16 + 64 <= sealed_at <= 112
        mass = weights[:, :sealed_at, rows].sum(axis=(0, 1))
        np.testing.assert_allclose(pages.mass[page, layer, :, head], mass, rtol=1e-4, atol=1e-6)
        where = pages.counted[page][:, None]
        assert where.sum() == (12 if page == 0 else 16)
        key_error = k[rows] - coarse(k[rows].astype(np.float32), -2, where)
        value_error = v[rows] - coarse(v[rows].astype(np.float32), -1, None)
        later = slice(sealed_at, sealed_at + 8)
        want = np.zeros(16)
        for g in range(group):
            for i in range(16):
                logit = q[later, g] @ key_error[i] * config.query_scale
                moved = logit[:, None] * (v[rows][i] - out[g, later]) + value_error[i]
                each = weights[g, later, rows][:, i] ** 2 * (moved**2).sum(-1)
                want[i] += each.mean() / group
        # A sum of squares that cancel in part: float32 leaves a few thousandths.
        got = pages.damage[page, layer, :, head]
        np.testing.assert_allclose(got, want, rtol=5e-3, atol=1e-4 * want.max())
        if window:  # sealed pages are out of sight
            assert not got.any()
        else:
            assert np.abs(got[::-1] - want).max() > 0.01 * want.max()


def planted_pages(count, seed):
    """Pages whose damage depends on one channel of the key, which the attention so far hides."""
    random = np.random.default_rng(seed)
    shape = (count, 2, 16, 2)
    keys = random.normal(size=(*shape, 8)).astype(np.float16)
    return importance_data.Pages(
        keys=keys,
        values=random.normal(size=(*shape, 8)).astype(np.float16),
        mass=random.uniform(0.5, 1.5, shape).astype(np.float32),
        seen=np.full((count, 16), 10, np.float32),
        error=np.ones(shape, np.float32),
        damage=np.exp(3 * keys[..., 2]).astype(np.float32),
        counted=np.ones((count, 16), bool),
    )


def test_training_finds_what_is_there(monkeypatch):
    """A quarter of what the fallback leaves, on pages it never saw; nothing without a signal."""
    monkeypatch.setattr(train_importance, "sample_pages", lambda *_, **__: planted_pages(40, 0))
    model = tiny_model(CONFIGS["llama"])
    tokens = random_tokens(model.config, 2000, seed=0)
    weights = ImportanceWeights(magnitude=0, learned=1, attention=0)
    config = dataclasses.replace(CONFIG, weights=weights)
    trained, again = (
        train_importance.train_importance(model, [tokens], config, tokens=400, steps=150)
        for _ in range(2)
    )
    rule, other = config.importance, planted_pages(20, 1)
    left = train_importance.damage_left(trained.learned, other, rule)
    without = train_importance.damage_left(None, other, rule)
    assert left < without / 4
    assert trained.damage_left < trained.damage_left_without / 4
    for a, b in zip(*(jax.tree.leaves(t.learned) for t in (trained, again)), strict=True):
        assert np.array_equal(a, b)
    shuffled = dataclasses.replace(other, damage=other.damage[:, :, ::-1])
    assert train_importance.damage_left(trained.learned, shuffled, rule) > without / 2


def test_short_texts():
    model = tiny_model(CONFIGS["llama"])
    with pytest.raises(TextError, match="text 2: expected at least 336 tokens, got 5"):
        train_importance.train_importance(model, [[1] * 900, [1] * 5], CONFIG, steps=2)


def test_command(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(importance_data, "SEQUENCE_TOKENS", 512)
    monkeypatch.setenv("KVCOMPRESS_PAGE_SIZE", "16")
    model, text = write_small_model(tmp_path / "model"), tmp_path / "text.txt"
    text.write_text(TEXT)
    out, figures = tmp_path / "score.safetensors", tmp_path / "figures.json"
    command = ["train-importance", "--model", str(model), "--text", str(text), "--steps", "3"]
    command += ["--tokens", "700", "--out", str(out), "--json", str(figures)]
    assert main(command) == 0
    assert "Damage that is left when half the tokens" in capsys.readouterr().out
    loaded = load_model(model)
    load_learned(
        out,
        fingerprint=loaded.fingerprint,
        layers=loaded.config.num_layers,
        kv_heads=loaded.config.num_kv_heads,
        head_dim=loaded.config.head_dim,
    )
    assert '"damage_left"' in figures.read_text()
    assert main([*command[:-4], "--out", str(tmp_path / "no" / "x.safetensors")]) == 2
    assert "expected a file in a folder that can be written to" in capsys.readouterr().err
