"""A profile and pages for it, without a model."""

import numpy as np

from kvcompress_jax.calibrated.fit import fit_keys
from kvcompress_jax.calibrated.profile import Profile
from kvcompress_jax.calibrated.row import RowLayout

FREQUENCY_BASE = 100.0


def frequencies(layers, dim):
    one = FREQUENCY_BASE ** -(np.arange(0, dim, 2) / dim)
    return np.broadcast_to(one, (layers, dim // 2)).astype(np.float32)


def turn(x, position, frequency):
    """RoPE of [heads, tokens, dim], float64."""
    angle = position[None, :, None] * np.asarray(frequency, np.float64)[None, None, :]
    first, second = np.split(np.asarray(x, np.float64), 2, axis=-1)
    cos, sin = np.cos(angle), np.sin(angle)
    return np.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


def make_profile(*, layers=1, heads=2, dim=64, key_bytes=20, value_bits=3, seed=0):
    """Fitted to correlated keys with an outlier channel, in a random metric."""
    rng = np.random.default_rng(seed)
    mixing = rng.normal(size=(heads, dim, dim)) * np.geomspace(3, 0.05, dim)[:, None]
    keys = rng.normal(size=(heads, 1500, dim)) @ mixing + rng.normal(size=(heads, 1, dim)) * 4
    keys[..., 3] *= 20
    half = rng.normal(size=(heads, dim, dim)) * np.geomspace(2, 0.1, dim)[:, None]
    metric = np.swapaxes(half, 1, 2) @ half
    fits = [fit_keys(k, m, bits=8 * key_bytes) for k, m in zip(keys, metric, strict=True)]

    def collect(name, dtype=np.float32):
        return np.array([[getattr(f, name) for f in fits]] * layers, dtype)

    return Profile(
        rows=RowLayout(key_bytes=key_bytes, value_bits=value_bits, refine_every=32),
        fingerprint="synthetic",
        mean=collect("mean"),
        decode=collect("decode"),
        scale=collect("scale"),
        step=collect("step"),
        widths=collect("widths", np.uint8),
        value_unit=np.full((layers, heads), 0.5, np.float32),
        about={"model": "synthetic", "bits": "3.25"},
    ), keys
