"""The basis, the bits and the metric against float64 from first principles."""

import jax.numpy as jnp
import numpy as np

from kvcompress_jax.calibrated.fit import WIDTHS, allocate, fit_keys, metric_basis, quantize
from kvcompress_jax.calibrated.metric import layer_statistics
from kvcompress_jax.models.dense import AttentionInputs
from kvcompress_jax.models.rope import layer_frequencies
from tests.models.tiny import CONFIGS


def correlated(seed, tokens=2000, dim=32):
    rng = np.random.default_rng(seed)
    return rng.normal(size=(tokens, dim)) @ (
        rng.normal(size=(dim, dim)) * np.geomspace(5, 0.1, dim)
    )


def some_metric(seed, dim=32):
    half = np.random.default_rng(seed).normal(size=(dim, dim)) * np.geomspace(3, 0.1, dim)
    return half.T @ half


def test_components_are_uncorrelated_and_errors_are_those_of_the_metric():
    keys, metric = correlated(0), some_metric(1)
    keys -= keys.mean(0)
    encode, decode = metric_basis(keys, metric)
    assert np.allclose(encode @ decode, np.eye(32), atol=1e-9)
    covariance = np.cov((keys @ encode).T, bias=True)
    spread = np.sqrt(np.diag(covariance))
    assert np.abs(covariance / np.outer(spread, spread) - np.eye(32)).max() < 1e-6
    assert np.all(np.diff(np.diag(covariance)) <= 1e-9)
    error = np.random.default_rng(2).normal(size=32)
    size, directions = np.linalg.eigh(metric)
    floored = (directions * np.maximum(size, 1e-4 * size[-1])) @ directions.T
    assert np.isclose(np.sum((error @ encode) ** 2), error @ floored @ error)
    assert not np.isclose(np.sum((error @ encode) ** 2), error @ error)


def test_bits_go_where_they_take_away_most():
    variance = np.geomspace(1, 1e-6, 16)
    distortion = np.array([variance * 4.0**-w for w in WIDTHS])
    for bits in (0, 1, 7, 40, 1000):
        widths = allocate(distortion, bits)
        assert widths.sum() <= bits and set(widths) <= set(WIDTHS)
        assert np.all(np.diff(widths) <= 0)
    assert allocate(distortion, 1000).min() == WIDTHS[-1]
    assert allocate(distortion, 40).sum() == 40
    cost = lambda w: sum(variance * 4.0 ** -np.asarray(w, float))  # noqa: E731
    assert cost(allocate(distortion, 40)) < 0.5 * cost([2.5] * 16)


def test_fit_beats_the_same_bits_without_basis():
    keys, metric = correlated(3), some_metric(4)
    fit = fit_keys(keys, metric, bits=64)  # two per component
    assert fit.widths.sum() <= 64
    assert np.all((fit.step > 0) == (fit.widths > 0))

    def cost(error):
        return np.mean(np.einsum("td,de,te->t", error, metric, error))

    new = correlated(3)[:500] + 0
    z = (new - fit.mean) @ fit.encode
    token = np.sqrt(((z / fit.scale)[:, fit.widths > 0] ** 2).mean(1, keepdims=True))
    step = fit.step * token
    coded = np.where(
        fit.widths > 0,
        np.stack(
            [
                quantize(z[:, c], np.maximum(step[:, c], 1e-9), max(w, 1))
                for c, w in enumerate(fit.widths)
            ],
            1,
        ),
        0,
    )
    ours = cost(coded @ fit.decode + fit.mean - new)
    lo, hi = new.min(0), new.max(0)
    plain = np.round((new - lo) / (hi - lo) * 3) / 3 * (hi - lo) + lo
    assert ours < 0.3 * cost(plain - new)
    shuffled = fit_keys(keys, np.eye(32), bits=64)
    assert not np.allclose(shuffled.decode, fit.decode, atol=1e-3)


def test_a_direction_that_the_samples_lack_does_not_blow_a_token_up():
    """Keys before RoPE of a first layer depend on the token alone: few tokens, few directions."""
    few = correlated(5)[:12]
    keys = np.tile(few, (50, 1))
    fit = fit_keys(keys, some_metric(6), bits=6 * 32)
    assert fit.scale.min() >= 2.0**-8 * fit.scale.max() * (1 - 1e-9)
    unseen = correlated(5)[500:600]
    z = ((unseen - fit.mean) @ fit.encode)[:, fit.widths > 0]
    token = np.sqrt(((z / fit.scale[fit.widths > 0]) ** 2).mean(1))
    assert token.max() < 2.0**8
    # Without the floor a direction of no size at all would say how large a token is.
    tiny = np.sqrt((((keys - fit.mean) @ fit.encode) ** 2).mean(0))
    assert np.sqrt((((unseen - fit.mean) @ fit.encode / tiny) ** 2).mean(1)).max() > 1e6


def test_metric_is_the_sum_that_it_says():
    """Also with a window and a soft cap: gemma3's layer 0 has one, its layer 1 has none."""
    import dataclasses

    config = dataclasses.replace(CONFIGS["gemma3"], head_dim=16, query_scale=0.25, soft_cap=5.0)
    rng = np.random.default_rng(0)
    tokens, group = 48, config.num_heads
    q = rng.normal(size=(3, 1, tokens, group, 16)).astype(np.float32) * 3
    k, v = (rng.normal(size=(3, 1, tokens, 1, 16)).astype(np.float32) for _ in range(2))
    seen = AttentionInputs(q=jnp.asarray(q), k=jnp.asarray(k), v=jnp.asarray(v))
    frequency = np.asarray(layer_frequencies(config), np.float64)
    for layer, window in ((0, 24), (1, 0)):
        found = layer_statistics(
            seen, jnp.int32(layer), jnp.asarray(frequency[layer], jnp.float32), config, 4
        )
        count = min(tokens // 2, 256 // group)
        sample = np.linspace(tokens // 4, tokens - 1, count).astype(np.float32).astype(int)
        want = np.zeros((16, 16))
        for i in sample:
            keep = [j for j in range(i + 1) if not window or i - j < window]
            for head in range(group):
                query = q[layer, 0, i, head].astype(np.float64)
                logits = k[layer, 0, keep, 0].astype(np.float64) @ query * config.query_scale
                capped = 5 * np.tanh(logits / 5)
                p = np.exp(capped - capped.max())
                p /= p.sum()
                out = p @ v[layer, 0, keep, 0]
                for j, share, logit in zip(keep, p, capped, strict=True):
                    if j < 4:
                        continue
                    slope = (1 - (logit / 5) ** 2) * config.query_scale
                    far = np.sum((v[layer, 0, j, 0] - out) ** 2)
                    angle = -j * frequency[layer]
                    a, b = np.split(query, 2)
                    turned = np.concatenate(
                        [
                            a * np.cos(angle) - b * np.sin(angle),
                            b * np.cos(angle) + a * np.sin(angle),
                        ]
                    )
                    want += share**2 * far * slope**2 * np.outer(turned, turned)
        want /= count * tokens
        assert np.abs(found.metric[0] - want).max() < 1e-4 * np.abs(want).max()
        assert np.abs(found.metric[0] - want.T[::-1]).max() > 1e-2 * np.abs(want).max()
        assert found.keys.shape == (1, tokens - 4, 16)
