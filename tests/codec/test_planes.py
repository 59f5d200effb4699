"""The embedded code against a float64 reference and its error bounds."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from kvcompress_jax.codec import (
    Scale,
    decode,
    encode,
    encode_bytes,
    fit_scale,
    refine,
    refined_position,
)

DTYPES = [jnp.bfloat16, jnp.float16, jnp.float32]
HEAD_DIMS = [64, 96, 128, 256]

# The position of a value in steps is computed in float32 and can be as large as 2048 + 15.
POSITION_EPS = 2.0**-24 * 4096


def reference_decode(base, scale, fine=None):
    """x' in float64, from the stored codes and scales alone; groups along the last axis but one."""
    step = np.asarray(scale.step, np.float64)[..., None, :]
    zero = np.asarray(scale.zero, np.float64)[..., None, :]
    position = np.asarray(base, np.float64)
    if fine is not None:
        position = position + (np.asarray(fine, np.float64) - 8) / 16
    return (position + zero) * step


def within_bound(x, decoded, lo, hi, cells=None):
    """|x - x'| <= half a cell, or for a base plane that a fine one goes with (None) half a step and
    half a cell of 16, the step being at most 1 + 2**-7 times what the range needs, or what
    float16 resolves of the values, or the smallest normal number."""
    x = np.asarray(x, np.float64)
    needed = np.maximum((hi - lo) / 15, np.maximum(abs(lo), abs(hi)) / 2048)
    step = np.maximum(needed * (1 + 2.0**-7), 2.0**-126)
    half = 0.5 / cells if cells else 0.5 + 0.5 / 16
    return bool(np.all(np.abs(x - decoded) <= step * (half + POSITION_EPS)))


def code(x, cells=16):
    scale = fit_scale(x, axis=-2)
    base, fine = encode(x, scale, axis=-2, cells=cells)
    return scale, base, fine


def keys(dim, dtype, seed=0):
    """Keys with the trouble of real ones: outlier channels, offsets, a constant and a zero one."""
    x = jax.random.normal(jax.random.key(seed), (64, dim), jnp.float32)
    x = x.at[:, 3].mul(40.0).at[:, 5].add(100.0).at[:, 7].set(1.7).at[:, 9].set(0.0)
    return x.astype(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", HEAD_DIMS)
def test_error_is_within_half_a_cell(dim, dtype):
    x = keys(dim, dtype)
    scale, base, fine = code(x)
    x64 = np.asarray(x, np.float64)
    lo, hi = x64.min(0), x64.max(0)
    assert within_bound(x64, reference_decode(base, scale), lo, hi)
    assert within_bound(x64, reference_decode(base, scale, fine), lo, hi, cells=16)
    _, alone, _ = code(x, cells=1)
    assert within_bound(x64, reference_decode(alone, scale), lo, hi, cells=1)
    _, *four = code(x, cells=4)
    assert within_bound(x64, reference_decode(four[0], scale, four[1]), lo, hi, cells=4)
    assert not np.any(np.asarray(four[1]) % 4)  # two bits
    # The judge can say no: one code off by one, one fine code off by one, a step off by 5 %.
    assert not within_bound(x64, reference_decode(base, scale), lo, hi, cells=1)
    assert not within_bound(x64, reference_decode(four[0], scale, four[1]), lo, hi, cells=16)
    assert not within_bound(x64, reference_decode(base.at[1, 1].add(1), scale), lo, hi)
    assert not within_bound(
        x64, reference_decode(base, scale, fine.at[1, 1].add(1)), lo, hi, cells=16
    )
    wide = Scale(step=scale.step * jnp.bfloat16(1.05), zero=scale.zero)
    assert not within_bound(x64, reference_decode(base, wide), lo, hi)


@pytest.mark.parametrize("dtype", DTYPES)
def test_decode_is_the_reference(dtype):
    scale, base, fine = code(keys(64, dtype))
    for planes in (None, fine):
        expected = reference_decode(base, scale, planes)
        got = np.asarray(decode(base, scale, axis=-2, fine=planes), np.float64)
        bound = 2.0**-22 * np.maximum(np.abs(expected), np.asarray(scale.step, np.float64) * 16)
        assert np.all(np.abs(got - expected) <= bound)
        assert not np.all(np.abs(got * 1.0001 - expected) <= bound)


@pytest.mark.parametrize("dtype", DTYPES)
def test_ends_of_the_range_are_exact(dtype):
    """Up to the 16 bits of the scales: zero is rounded by 2**-12 of itself, the step by 2**-7."""
    x = keys(128, dtype)
    x = x.at[:, 5].set(x[:, 4])  # no offset: that costs resolution of the zero point
    scale, base, fine = code(x)
    x64 = np.asarray(x, np.float64)
    step = np.asarray(scale.step, np.float64)
    lo, hi = x64.argmin(0), x64.argmax(0)
    channels = np.setdiff1d(np.arange(128), [7, 9])
    for ends, share in ((lo, 2.0**-8), (hi, 2.0**-3)):
        for planes, cells in ((None, 1), (fine, 16)):
            # The top end, when the step was rounded up, may lie nearer to another of the cells.
            near = min(share, 0.5 / cells)
            decoded = reference_decode(base, scale, planes)
            off = np.abs(decoded - x64)[ends, np.arange(128)] / np.where(step > 0, step, 1)
            assert np.all(off[channels] <= near + 2.0**-10), off.max()
    assert np.all(np.asarray(base)[lo, np.arange(128)][channels] == 0)
    assert np.all(np.asarray(base)[hi, np.arange(128)][channels] == 15)


@pytest.mark.parametrize("dtype", DTYPES)
def test_constant_channels_survive_and_zeros_stay_zero(dtype):
    x = jnp.zeros((64, 4), dtype).at[:, 1].set(jnp.asarray(1.7, dtype)).at[:, 2].set(-1000)
    scale, base, fine = code(x)
    for planes in (None, fine):
        decoded = np.asarray(decode(base, scale, axis=-2, fine=planes), np.float64)
        x64 = np.asarray(x, np.float64)
        assert np.all(np.abs(decoded - x64) <= np.abs(x64) * 2.0**-11)
        assert np.all(decoded[:, [0, 3]] == 0)


@pytest.mark.parametrize("magnitude", [1e-45, 1e-40, 1e-38, 1e-30, 1e-3, 1e4, 1e30, 3e38])
def test_any_range(magnitude):
    x = jax.random.uniform(jax.random.key(1), (64, 64), jnp.float32, -1.0, 1.0)
    x = x.at[:, 0].set(jnp.linspace(0.5, 1.0, 64)) * np.float32(magnitude)
    scale, base, fine = code(x)
    x64 = np.asarray(x, np.float64)
    lo, hi = x64.min(0), x64.max(0)
    if magnitude < 2.0**-126:  # may be flushed to zero before we see it
        assert np.all(np.abs(reference_decode(base, scale, fine) - x64) <= 2.0**-126)
        return
    assert within_bound(x64, reference_decode(base, scale), lo, hi)
    assert within_bound(x64, reference_decode(base, scale, fine), lo, hi, cells=16)


def test_channels_do_not_disturb_each_other():
    x = keys(64, jnp.float32)
    alone = code(x)
    with_outlier = code(x.at[:, 0].mul(1e30))
    for a, b in zip(jax.tree.leaves(alone), jax.tree.leaves(with_outlier), strict=True):
        assert np.array_equal(np.asarray(a)[..., 1:], np.asarray(b)[..., 1:])


def test_masked_tokens_do_not_widen_the_scale():
    x = keys(64, jnp.float32)
    counted = jnp.arange(64)[:, None] >= 4
    spiked = x.at[:4].add(1000.0)
    plain, masked = fit_scale(x[4:], axis=-2), fit_scale(spiked, axis=-2, where=counted)
    assert all(
        np.array_equal(a, b) for a, b in zip(*map(jax.tree.leaves, (plain, masked)), strict=False)
    )
    assert not np.array_equal(plain.step, fit_scale(spiked, axis=-2).step)
    nothing = fit_scale(x, axis=-2, where=jnp.zeros((64, 1), bool))
    assert not np.asarray(nothing.step).any()
    assert not np.asarray(nothing.zero).any()


@given(
    hnp.arrays(
        np.float32,
        (16, 2),
        elements=st.floats(-(2.0**100), 2.0**100, width=32, allow_subnormal=False),
    )
)
def test_bound_holds_for_any_values(x):
    scale, base, fine = code(jnp.asarray(x))
    x64 = x.astype(np.float64)
    lo, hi = x64.min(0), x64.max(0)
    assert within_bound(x64, reference_decode(base, scale), lo, hi)
    assert within_bound(x64, reference_decode(base, scale, fine), lo, hi, cells=16)


def test_the_base_plane_is_plain_int4_and_the_fine_plane_only_refines_it():
    x = keys(64, jnp.float32)
    scale, base, fine = code(x)
    coarse = decode(base, scale, axis=-2)
    refined = decode(base, scale, axis=-2, fine=fine)
    step = np.asarray(scale.step, np.float32)[None]
    assert np.all(np.abs(np.asarray(refined - coarse)) <= step * 0.5)
    assert np.all(np.asarray(fine) < 16)
    cell = np.asarray(x, np.float64) / np.where(step > 0, step, 1) - np.asarray(
        scale.zero, np.float64
    )
    off_middle = np.abs(cell - np.floor(cell)) - 0.5
    clear = np.abs(off_middle) > 1 / 32 + 1e-3  # away from the border of two cells
    assert np.array_equal(
        np.asarray(base)[clear], np.clip(np.floor(cell + 0.5), 0, 15).astype(np.uint8)[clear]
    )


@pytest.mark.parametrize("axis", [-2, -1])
@pytest.mark.parametrize("dtype", DTYPES)
def test_one_byte_holds_both_codes(dtype, axis):
    x = keys(64, dtype)
    scale = fit_scale(x, axis=axis)
    for cells in (1, 4):
        pair = encode(x, scale, axis=axis, cells=cells)
        each = encode_bytes(x, scale, axis=axis, cells=jnp.full(x.shape, float(cells)))
        assert np.array_equal(each, (pair[0] << jnp.uint8(4)) | pair[1])
    base, fine = encode(x, scale, axis=axis)
    both = encode_bytes(x, scale, axis=axis)
    assert np.array_equal(both, (base << jnp.uint8(4)) | fine)
    assert not np.array_equal(both, (fine << jnp.uint8(4)) | base)


def test_position_of_a_byte_is_that_of_its_codes_to_the_bit():
    codes = jnp.arange(256, dtype=jnp.uint8)
    base, fine = codes >> jnp.uint8(4), codes & jnp.uint8(15)
    wanted = base.astype(jnp.float32) + refine(fine)
    assert np.array_equal(refined_position(codes, jnp.bool_(True)), wanted)
    coarse = refined_position(base << jnp.uint8(4), jnp.bool_(False))
    assert np.array_equal(coarse, base.astype(jnp.float32))
    assert not np.array_equal(coarse, wanted)
