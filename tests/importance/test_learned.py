"""The learned score: its features, its file, its place in the formula and in the paged cache."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kvcompress_jax.config import CompressionConfig, ConfigError
from kvcompress_jax.importance import ImportanceRule, ImportanceWeights, TokenStatistics
from kvcompress_jax.importance.learned import (
    ImportanceFileError,
    feature_count,
    features,
    init_learned,
    load_learned,
    save_learned,
)
from kvcompress_jax.models.runner import make_runner
from tests.models.tiny import CONFIGS, random_tokens, tiny_model

pytestmark = pytest.mark.slow

LAYERS, TOKENS, HEADS, DIM = 2, 16, 3, 8
SHAPE = {"fingerprint": "tiny", "layers": LAYERS, "kv_heads": HEADS, "head_dim": DIM}
EVERY = np.ones((TOKENS, HEADS), bool)


def learned(seed=0, layers=LAYERS, heads=HEADS, dim=DIM):
    keys = iter(jax.random.split(jax.random.key(seed), 3))
    shape = (layers, heads, feature_count(dim))
    mean = jax.random.normal(next(keys), shape)
    scale = jax.random.uniform(next(keys), shape, minval=0.5)
    return init_learned(next(keys), mean, scale, hidden=4)


def statistics(seed=0):
    key = iter(jax.random.split(jax.random.key(seed), 8))
    keys, values = (jax.random.normal(next(key), (TOKENS, HEADS, DIM)) for _ in range(2))
    return TokenStatistics(
        keys=keys,
        values=values,
        mass=jax.random.uniform(next(key), (TOKENS, HEADS), minval=0.1) * 10,
        seen=jnp.arange(TOKENS, 0, -1).astype(jnp.float32),
        error=jax.random.uniform(next(key), (TOKENS, HEADS), minval=0.1),
    )


def layer_of(score, layer):
    return jax.tree.map(lambda x: x[layer], score)


def reference(score, layer, s):
    """The score of a layer in float64, written down from the documentation."""
    leaf = lambda x: np.asarray(x, np.float64)[layer]  # noqa: E731
    keys, values, mass, seen, error = (
        np.asarray(x, np.float64) for x in (s.keys, s.values, s.mass, s.seen, s.error)
    )
    attention = np.log(mass / seen[:, None])
    relative = lambda x: x - x.mean(axis=0)  # noqa: E731
    wide = lambda x: np.repeat(x[:, None], HEADS, axis=1)  # noqa: E731
    scalars = np.stack(
        [
            relative(attention),
            attention,
            wide(np.log(seen)),
            relative(np.log(error)),
            relative(np.log(np.linalg.norm(keys, axis=-1))),
            relative(np.log(np.linalg.norm(values, axis=-1))),
            wide(np.arange(TOKENS) / TOKENS),
        ],
        axis=-1,
    )
    pairs = np.hypot(keys[..., : DIM // 2], keys[..., DIM // 2 :])
    x = np.concatenate([scalars, keys, pairs, values], axis=-1)
    out = np.empty((TOKENS, HEADS))
    first, second = (score.params[f"Dense_{i}"] for i in range(2))
    for head in range(HEADS):
        y = (x[:, head] - leaf(score.mean)[head]) * leaf(score.scale)[head]
        y = y @ leaf(first["kernel"])[head] + leaf(first["bias"])[head]
        y = 0.5 * y * (1 + np.tanh((2 / np.pi) ** 0.5 * (y + 0.044715 * y**3)))
        y = (y @ leaf(second["kernel"])[head] + leaf(second["bias"])[head])[:, 0]
        out[:, head] = leaf(score.gain)[head] * scalars[:, head, 0] + y
    return np.exp(out / 2)


# Float32: sums of some ten products of size 1, then exp: 1e-6 of the score, ten times that.
RELATIVE = 1e-5


def test_score():
    score, s = learned(), statistics()
    for layer in range(LAYERS):
        got = layer_of(score, layer)(s, EVERY)
        assert (got.shape, got.dtype) == ((TOKENS, HEADS), jnp.float32)
        np.testing.assert_allclose(got, reference(score, layer, s), rtol=RELATIVE)
    other = reference(score, 1, s)
    assert np.abs(layer_of(score, 0)(s, EVERY) / other - 1).max() > 100 * RELATIVE


@pytest.mark.parametrize("field", ["keys", "values", "mass", "seen", "error"])
def test_every_statistic_counts(field):
    s, score = statistics(), layer_of(learned(), 0)
    changed = dataclasses.replace(s, **{field: getattr(s, field)[::-1]})
    assert np.abs(np.log(score(s, EVERY) / score(changed, EVERY))).max() > 1e-3


def test_rotated_keys_have_the_same_pairs():
    """RoPE turns channels d and d + dim/2 into each other: their norm stays."""
    s = statistics()
    half = DIM // 2
    a, b = s.keys[..., :half], s.keys[..., half:]
    angle = 0.7
    turned = jnp.concatenate(
        [a * np.cos(angle) - b * np.sin(angle), b * np.cos(angle) + a * np.sin(angle)], axis=-1
    )
    here, there = (features(dataclasses.replace(s, keys=keys), EVERY) for keys in (s.keys, turned))
    pairs = slice(7 + DIM, 7 + DIM + half)
    np.testing.assert_allclose(here[..., pairs], there[..., pairs], rtol=1e-5)
    assert np.abs(here[..., 7 : 7 + half] - there[..., 7 : 7 + half]).max() > 0.1


def test_scores_are_finite_and_positive():
    s = jax.tree.map(jnp.zeros_like, statistics())
    score = layer_of(learned(), 0)(s, EVERY)
    assert np.isfinite(score).all()
    assert (np.asarray(score) > 0).all()
    huge = jax.tree.map(lambda x: x + 1e18, s)
    assert np.isfinite(layer_of(learned(), 0)(huge, EVERY)).all()


def test_takes_the_place_of_the_fallback():
    s, score = statistics(), layer_of(learned(), 0)
    rule = ImportanceRule(weights=ImportanceWeights(magnitude=0, learned=1, attention=0))
    plain = rule(s)
    with_score = rule(s, learned=score)
    order = lambda x: np.argsort(np.asarray(x), axis=0)  # noqa: E731
    assert np.array_equal(order(with_score), order(score(s, EVERY)))
    assert not np.array_equal(order(plain), order(with_score))
    blind = ImportanceRule(weights=ImportanceWeights(magnitude=1, learned=0, attention=1))
    assert np.array_equal(blind(s), blind(s, learned=score))


def test_file_round_trip(tmp_path):
    path, score = tmp_path / "score.safetensors", learned()
    save_learned(path, score, fingerprint="tiny")
    again = load_learned(path, **SHAPE)
    assert jax.tree.structure(again) == jax.tree.structure(score)
    for a, b in zip(jax.tree.leaves(again), jax.tree.leaves(score), strict=True):
        assert np.array_equal(a, b)
        assert a.dtype == b.dtype


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"fingerprint": "other"}, r"fingerprint: expected other, got tiny$"),
        ({"layers": 3}, r"Dense_0\.bias: expected float32\[3, 3, 4\], got float32\[2, 3, 4\]$"),
        ({"head_dim": 16}, r"Dense_0\.kernel: expected float32\[2, 3, 47, 4\], got"),
    ],
)
def test_refuses_a_foreign_model(tmp_path, change, message):
    path = tmp_path / "score.safetensors"
    save_learned(path, learned(), fingerprint="tiny")
    with pytest.raises(ImportanceFileError, match=message) as error:
        load_learned(path, **SHAPE | change)
    assert "\n" not in str(error.value)


def test_refuses_other_files(tmp_path):
    from safetensors.numpy import save_file

    path = tmp_path / "score.safetensors"
    with pytest.raises(ImportanceFileError, match="expected a safetensors file, got: "):
        load_learned(path, **SHAPE)
    path.write_bytes(b"no")
    with pytest.raises(ImportanceFileError, match="expected a safetensors file, got: "):
        load_learned(path, **SHAPE)
    save_file({"x": np.zeros(1, np.float32)}, str(path))
    with pytest.raises(ImportanceFileError, match="format: expected kvcompress learned importance"):
        load_learned(path, **SHAPE)
    broken = dataclasses.replace(learned(), gain=jnp.full((LAYERS, HEADS), jnp.nan))
    save_learned(path, broken, fingerprint="tiny")
    with pytest.raises(ImportanceFileError, match="gain: expected finite numbers, got others"):
        load_learned(path, **SHAPE)


CONFIG = CompressionConfig(page_size=16, window_tokens=0)


def codes(config, name="llama"):
    """The order in which the tokens of a sequence's pages are stored, and the runner."""
    model = tiny_model(CONFIGS[name])
    runner = make_runner(model, config, tokens=256, max_sequences=1, kv_dtype="float32")
    sequence = runner.manager.add()
    runner.extend(sequence, random_tokens(model.config, 96, seed=1))
    runner.advance()
    return np.asarray(runner.cache.order[:, :6]), runner


def test_orders_the_tokens_of_sealed_pages(tmp_path):
    path = tmp_path / "score.safetensors"
    config = CONFIGS["llama"]
    score = learned(layers=config.num_layers, heads=config.num_kv_heads, dim=config.head_dim)
    kernel = score.params["Dense_1"]["kernel"] * 100  # an opinion of its own
    score.params["Dense_1"]["kernel"] = kernel
    save_learned(path, score, fingerprint="tiny")
    plain, _ = codes(CONFIG)
    ordered, runner = codes(dataclasses.replace(CONFIG, learned_importance=str(path)))
    assert not np.array_equal(plain, ordered)
    assert np.array_equal(np.sort(plain), np.sort(ordered))
    runner.manager.verify(runner.cache)  # the weights are in the bytes of the pools
    bytes_of = sum(x.nbytes for x in jax.tree.leaves(score))
    assert runner.manager.sizes.learned_bytes == bytes_of
    again, _ = codes(dataclasses.replace(CONFIG, learned_importance=str(path)))
    assert np.array_equal(ordered, again)


def test_one_file_serves_many_runners(tmp_path):
    """Caches are donated; what they hold of the score must not be somebody else's."""
    path = tmp_path / "score.safetensors"
    config = CONFIGS["llama"]
    score = learned(layers=config.num_layers, heads=config.num_kv_heads, dim=config.head_dim)
    save_learned(path, score, fingerprint="tiny")
    _, runner = codes(dataclasses.replace(CONFIG, learned_importance=str(path)))
    from kvcompress_jax.paged import init_cache

    cache = init_cache(runner.layout, runner.manager.sizes, learned=score)
    runner.manager.verify(dataclasses.replace(runner.cache, learned=cache.learned))
    assert cache.learned.gain is not score.gain


def test_settings(tmp_path):
    path = tmp_path / "score.safetensors"
    save_learned(path, learned(), fingerprint="other")
    with pytest.raises(ConfigError, match=r"learned_importance: .*fingerprint: expected tiny"):
        codes(dataclasses.replace(CONFIG, learned_importance=str(path)))
    for config in ({"levels": 2}, {"seal_level": 2}):
        with pytest.raises(ConfigError, match="learned_importance: expected None where attention"):
            CompressionConfig(learned_importance="x", **config)
    environment = {"KVCOMPRESS_LEARNED_IMPORTANCE": str(path)}
    assert CompressionConfig.from_env(environment).learned_importance == str(path)
    toml = tmp_path / "config.toml"
    toml.write_text('learned_importance = "score.safetensors"\ntelemetry_share = 0.1\n')
    assert CompressionConfig.from_toml(toml).learned_importance == str(
        tmp_path / "score.safetensors"
    )
    toml.write_text("learned_importance = 3\n")
    with pytest.raises(ConfigError, match="learned_importance: expected str, got 3"):
        CompressionConfig.from_toml(toml)
