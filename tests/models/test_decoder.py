"""Parts of the decoder against NumPy in float64, and what the attention callback is promised."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kvcompress_jax.models.config import FrequencyDivisors, LinearScaling, Rope
from kvcompress_jax.models.decoder import decode, logits
from kvcompress_jax.models.dense import capture_forward, dense_attention, dense_forward
from kvcompress_jax.models.params import init_params
from kvcompress_jax.models.rope import frequencies, rope_table, rotate
from tests.models.tiny import CONFIGS, tiny_model


def reference_attention(q, k, v, *, scale, window=0, soft_cap=None):
    """Float64, one query at a time."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    out = np.zeros(q.shape)
    for b, t, h in np.ndindex(q.shape[:3]):
        kv_head = h // (q.shape[2] // k.shape[2])
        first = max(0, t + 1 - window) if window else 0
        scores = k[b, first : t + 1, kv_head] @ q[b, t, h] * scale
        if soft_cap is not None:
            scores = soft_cap * np.tanh(scores / soft_cap)
        weights = np.exp(scores - scores.max())
        out[b, t, h] = weights @ v[b, first : t + 1, kv_head] / weights.sum()
    return out


@pytest.mark.parametrize(("window", "soft_cap"), [(0, None), (5, None), (1, None), (0, 3.0)])
@pytest.mark.parametrize(("heads", "kv_heads", "dim"), [(6, 2, 64), (4, 4, 96), (3, 1, 256)])
def test_dense_attention(heads, kv_heads, dim, window, soft_cap):
    keys = jax.random.split(jax.random.key(0), 3)
    shapes = ((2, 11, heads, dim), (2, 11, kv_heads, dim), (2, 11, kv_heads, dim))
    q, k, v = (jax.random.normal(key, s) for key, s in zip(keys, shapes, strict=True))
    out = dense_attention(q, k, v, scale=0.3, window=jnp.int32(window), soft_cap=soft_cap)
    expected = reference_attention(q, k, v, scale=0.3, window=window, soft_cap=soft_cap)
    tolerance = 8 * dim * np.finfo(np.float32).eps  # dim products of order 1 go into a logit
    assert np.abs(out - expected).max() < tolerance
    wrong = reference_attention(q, k, v, scale=0.3, window=window + 2, soft_cap=soft_cap)
    assert np.abs(out - wrong).max() > 100 * tolerance


def test_rotation_is_of_halves_and_by_position():
    rope = Rope(theta=100.0)
    x = np.zeros((3, 1, 8), np.float32)
    x[:, 0, 1] = 1  # turns with channel 5, by 100 ** -(2 / 8) per position
    positions = np.array([0, 2, 5], np.int32)
    out = np.asarray(rotate(jnp.asarray(x), rope_table(rope, 8, jnp.asarray(positions))))
    angles = positions * 100.0**-0.25
    np.testing.assert_allclose(out[:, 0, 1], np.cos(angles), atol=1e-6)
    np.testing.assert_allclose(out[:, 0, 5], np.sin(angles), atol=1e-6)
    assert np.abs(out[:, 0, [0, 2, 3, 4, 6, 7]]).max() == 0


def test_scaled_frequencies():
    plain = frequencies(Rope(theta=1e4), 64)
    np.testing.assert_allclose(plain, 1e4 ** (-np.arange(0, 64, 2) / 64), rtol=1e-6)
    linear = frequencies(Rope(theta=1e4, scaling=LinearScaling(factor=4.0)), 64)
    np.testing.assert_allclose(linear, plain / 4, rtol=1e-6)
    divisors = tuple(1.0 + i for i in range(32))
    listed = frequencies(Rope(theta=1e4, scaling=FrequencyDivisors(divisors=divisors)), 64)
    np.testing.assert_allclose(listed, plain / np.array(divisors), rtol=1e-6)


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_captured_inputs_are_those_of_the_attention(name):
    """A pass whose attention reads the captured inputs instead of its own is the same pass."""
    model = tiny_model(CONFIGS[name])
    config, params = model.config, model.params
    tokens = jax.random.randint(jax.random.key(3), (2, 24), 0, config.vocab_size)
    scores, seen = capture_forward(params, config, tokens)
    np.testing.assert_allclose(scores, dense_forward(params, config, tokens), atol=2e-5)
    batch = (config.num_layers, 2, 24)
    assert seen.q.shape == (*batch, config.num_heads, config.head_dim)
    assert seen.k.shape == seen.v.shape == (*batch, config.num_kv_heads, config.head_dim)

    @jax.jit
    def replay(seen):
        def attention(q, k, v, layer, window, calls):
            out = dense_attention(
                seen.q[layer],
                seen.k[layer],
                seen.v[layer],
                scale=config.query_scale,
                window=window,
                soft_cap=config.soft_cap,
            )
            return out.reshape(q.shape), calls + 1

        positions = jnp.tile(jnp.arange(24, dtype=jnp.int32), 2)
        hidden, calls = decode(
            params, config, tokens.reshape(-1), positions, attention, jnp.int32(0)
        )
        return logits(params, config, hidden).reshape(scores.shape), calls

    replayed, calls = replay(seen)
    assert int(calls) == config.num_layers
    np.testing.assert_allclose(replayed, scores, atol=2e-5)
    for field in ("q", "k", "v"):
        wrong = dataclasses.replace(seen, **{field: jnp.flip(getattr(seen, field), axis=0)})
        assert np.abs(replay(wrong)[0] - scores).max() > 1e-3, field


@pytest.mark.parametrize("name", CONFIGS)
def test_later_tokens_change_nothing(name):
    model = tiny_model(CONFIGS[name])
    tokens = jax.random.randint(jax.random.key(3), (2, 24), 0, model.config.vocab_size)
    changed = tokens.at[:, 16:].set(5)
    a = dense_forward(model.params, model.config, tokens)
    b = dense_forward(model.params, model.config, changed)
    np.testing.assert_array_equal(a[:, :16], b[:, :16])
    assert np.abs(a[:, 16:] - b[:, 16:]).max() > 1e-2


def test_callback_gets_layers_and_windows_and_may_return_float32():
    config = CONFIGS["gemma3"]
    params = init_params(config, jax.random.key(0), jnp.bfloat16)

    def attention(q, k, v, layer, window, state):
        assert q.dtype == k.dtype == v.dtype == jnp.bfloat16
        return q.astype(jnp.float32), state.at[layer].set(window)

    tokens = jnp.arange(4, dtype=jnp.int32)
    start = jnp.full(config.num_layers, -1, jnp.int32)
    hidden, windows = decode(params, config, tokens, tokens, attention, start)
    assert tuple(windows.tolist()) == config.layer_windows
    assert hidden.dtype == jnp.bfloat16
    assert logits(params, config, hidden).dtype == jnp.float32


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architecture": "mamba"}, r"architecture: expected one of .*, got mamba"),
        ({"num_layers": 0}, r"num_layers: expected at least 1, got 0"),
        ({"head_dim": 63}, r"head_dim: expected an even number, got 63"),
        ({"num_kv_heads": 3}, r"num_kv_heads: expected a divisor of num_heads=4, got 3"),
        ({"activation": "relu"}, r"activation: expected one of .*, got relu"),
        ({"norm_eps": float("nan")}, r"norm_eps: expected more than 0, got nan"),
        ({"soft_cap": 0.0}, r"soft_cap: expected more than 0 or None, got 0.0"),
        ({"layer_windows": (0, 0)}, r"layer_windows: expected 3 entries, one per layer, got 2"),
        (
            {"layer_windows": (0, 0, 8)},
            r"layer_windows: expected only 0 and sliding_window=None, got \[0, 8\]",
        ),
        (
            {"rope": Rope(theta=1e4, scaling=FrequencyDivisors(divisors=(1.0,)))},
            r"divisors: expected 32, got 1",
        ),
    ],
)
def test_wrong_configuration(changes, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(CONFIGS["llama"], **changes)


def test_configuration_is_hashable():
    assert hash(CONFIGS["gemma3"]) == hash(dataclasses.replace(CONFIGS["gemma3"]))
