"""compress_kv_block with the specification's semantics."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kvcompress_jax.codec import NonFiniteError
from kvcompress_jax.config import CompressionConfig
from kvcompress_jax.transforms import compress_kv_block, decompress_kv_block


def block(tokens=64, heads=2, dim=64, dtype=jnp.bfloat16, seed=0):
    x = jax.random.normal(jax.random.key(seed), (2, tokens, heads, dim), jnp.float32)
    return x.at[0, ..., 3].mul(40.0).astype(dtype)


def errors(x, back):
    """Error of each token and head in units of what 4 bits allow: half a step, per channel for
    keys and per token for values, plus the rounding to the block's dtype."""
    x64, back = np.asarray(x, np.float64), np.asarray(back, np.float64)
    rounding = float(jnp.finfo(x.dtype).eps) * np.abs(x64)
    out = []
    for i, axis in ((0, 0), (1, -1)):
        extent = x64[i].max(axis, keepdims=True) - x64[i].min(axis, keepdims=True)
        out.append(np.maximum(np.abs(back[i] - x64[i]) - rounding[i], 0) / (extent / 30))
    return np.stack(out).max(axis=(0, -1))  # [tokens, heads]


SLACK = 1 + 2.0**-6  # the step is rounded up to bfloat16


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
@pytest.mark.parametrize("dim", [64, 96, 128, 256])
def test_levels(dim, dtype):
    x = block(dim=dim, dtype=dtype)
    assert compress_kv_block(x, 0) is x
    assert decompress_kv_block(x) is x
    for ratio in (0.25, 0.5, 1.0):
        config = CompressionConfig(ratio=ratio)
        coded = jax.jit(compress_kv_block, static_argnums=(1, 2))(x, 1, config)
        back = decompress_kv_block(coded)
        assert back.dtype == x.dtype
        assert back.shape == x.shape
        error = errors(x, back)
        assert np.all(error <= SLACK)
        fine = error <= SLACK / 16
        assert np.all(fine.sum(axis=0) >= round(ratio * 64))
        selected = np.asarray(coded.order)[:, : round(ratio * 64)].astype(int)
        assert all(fine[selected[h], h].all() for h in range(2))
    plain = decompress_kv_block(compress_kv_block(x, 2))
    error = errors(x, plain)
    assert np.all(error <= SLACK)
    assert not np.all(error <= SLACK / 2)


def test_bits():
    x = block(tokens=64, heads=4, dim=128)
    for level, ratio, bits in ((1, 1.0, 8), (1, 0.5, 6), (2, 0.5, 4)):
        coded = compress_kv_block(x, level, CompressionConfig(ratio=ratio))
        overhead = 32 / 128 / 2 + 32 / 64 / 2 + 8 / 256  # value scales, key scales, order
        assert 8 * coded.nbytes / x.size == pytest.approx(bits + overhead)


def test_attention_decides_who_is_selected():
    x = block(dtype=jnp.float32)
    loved = jnp.zeros((64, 2)).at[40:56].set(1.0)
    coded = compress_kv_block(x, 1, CompressionConfig(ratio=0.25), attention=loved)
    assert np.array_equal(np.sort(coded.order[:, :16]), np.broadcast_to(np.arange(40, 56), (2, 16)))
    indifferent = compress_kv_block(x, 1, CompressionConfig(ratio=0.25))
    assert not np.array_equal(np.sort(indifferent.order[:, :16]), np.sort(coded.order[:, :16]))


def test_extremes_do_not_overflow():
    signs = jax.random.rademacher(jax.random.key(0), (2, 16, 1, 64), jnp.bfloat16)
    x = signs * jnp.bfloat16(3.3e38)
    for level in (1, 2):
        back = decompress_kv_block(compress_kv_block(x, level))
        assert np.isfinite(np.asarray(back, np.float32)).all()
        assert np.all(errors(x, back) <= SLACK)


def test_two_levels_mean_int8_for_all():
    coded = compress_kv_block(block(), 1, CompressionConfig(levels=2, ratio=0.25))
    assert coded.fine.shape == coded.base.shape  # a row for every token
    less = compress_kv_block(block(), 1, CompressionConfig(levels=3, ratio=0.25))
    assert 4 * less.fine.shape[2] == less.base.shape[2]


def test_not_finite():
    x = block().at[1, 5, 1, 3].set(jnp.inf)
    message = "values: expected finite values, got 1 that are not in layer 3, head 1, page 9"
    with pytest.raises(NonFiniteError, match=message):
        compress_kv_block(x, 2, layer=3, page=9)
    jax.jit(compress_kv_block, static_argnums=1)(x, 2)  # values cannot be seen there


@pytest.mark.parametrize(
    ("x", "level", "message"),
    [
        (jnp.zeros((64, 2, 64)), 1, r"block: expected \[2, at most 256, heads, even\], got"),
        (jnp.zeros((2, 257, 2, 64)), 1, r"block: expected .*, got \[2, 257, 2, 64\]"),
        (jnp.zeros((2, 64, 2, 64)), 3, "level: expected 0 to 2, got 3"),
        (jnp.zeros((2, 64, 2, 64)), -1, "level: expected 0 to 2, got -1"),
    ],
)
def test_errors(x, level, message):
    with pytest.raises(ValueError, match=message):
        compress_kv_block(x, level)


def test_a_block_cannot_have_six_bits_for_all():
    with pytest.raises(ValueError, match="config: expected fine_bits=4 or None for a block, got 2"):
        compress_kv_block(block(), 1, CompressionConfig(fine_bits=2))
