"""Rows of bytes against the documented format, in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kvcompress_jax.calibrated import decode_rows, encode_rows
from kvcompress_jax.calibrated.code import LARGEST
from kvcompress_jax.calibrated.row import RowLayout
from kvcompress_jax.codec.hadamard import hadamard_matrix
from tests.calibrated.synthetic import frequencies, make_profile, turn

PAGE = 64
FIRST = 192


def setup(dim=64, value_bits=3, dtype=np.float32, seed=0):
    profile, before = make_profile(dim=dim, key_bytes=20 * dim // 64, value_bits=value_bits)
    frequency = frequencies(1, dim)
    position = FIRST + np.arange(PAGE)
    keys = turn(before[:, :PAGE], position, frequency[0]).astype(np.float32)
    rng = np.random.default_rng(seed)
    values = rng.normal(size=keys.shape).astype(np.float32)
    attention = rng.uniform(size=keys.shape[:2]).astype(np.float32)
    code = profile.code(jnp.asarray(frequency)).at(0)
    arrays = [jnp.asarray(x, dtype) for x in (keys, values)]
    return profile, code, *arrays, jnp.asarray(attention)


def encode(profile, code, keys, values, attention, exact=None):
    exact = jnp.zeros((PAGE,), bool) if exact is None else exact
    return encode_rows(keys, values, attention, exact, jnp.int32(FIRST), code, profile.rows)


def reference_decode(profile, row, refined, first=FIRST):
    """Straight from the format, one token after the other."""
    rows, dim = profile.rows, profile.mean.shape[-1]
    row, refined = np.asarray(row), np.asarray(refined)
    back = hadamard_matrix(dim).T
    keys = np.zeros((*row.shape[:2], dim))
    values = np.zeros_like(keys)

    def take(bits, width):  # the low bit comes first
        return sum(bits.pop(0) << i for i in range(width))

    for h in range(row.shape[0]):
        for t in range(row.shape[1]):
            raw = row[h, t]
            bits = [int(b >> i) & 1 for b in raw[: rows.key_bytes] for i in range(8)]
            scale = 2 ** ((int(raw[-3]) - 128) / 8)
            z = np.zeros(dim)
            for c, width in enumerate(profile.widths[0, h]):
                if width:
                    middle = (2 ** int(width) - 1) / 2
                    z[c] = (take(bits, int(width)) - middle) * profile.step[0, h, c] * scale
            bits = [int(b >> i) & 1 for b in raw[rows.key_bytes : -3] for i in range(8)]
            step = 2 ** ((int(raw[-2]) - 128) / 8) * profile.value_unit[0, h]
            middle = (int(raw[-1]) - 128) / 8 - (2**rows.value_bits - 1) / 2
            y = np.array([take(bits, rows.value_bits) + middle for _ in range(dim)]) * step
            keys[h, t] = z @ profile.decode[0, h].astype(np.float64)
            values[h, t] = y @ back
        for n in range(refined.shape[1]):
            for out, raw, matrix in (
                (keys, refined[h, n, 0], profile.decode[0, h].astype(np.float64)),
                (values, refined[h, n, 1], back),
            ):
                step = np.array([0, 0, raw[1], raw[2]], np.uint8).view("<f4")[0].astype(np.float64)
                out[h, raw[0]] += raw[3:].view(np.int8) * step @ matrix
        keys[h] += profile.mean[0, h]
    return turn(keys, first + np.arange(row.shape[1]), frequencies(1, dim)[0]), values


@pytest.mark.parametrize(("dim", "value_bits"), [(64, 2), (64, 3), (96, 3), (128, 4), (256, 5)])
def test_decode_is_the_documented_format(dim, value_bits):
    profile, code, keys, values, attention = setup(dim, value_bits)
    row, refined = encode(profile, code, keys, values, attention)
    assert row.shape == (2, PAGE, profile.rows.row_bytes(dim)) and row.dtype == jnp.uint8
    got = decode_rows(row, refined, jnp.int32(FIRST), code, profile.rows)
    want = reference_decode(profile, row, refined)
    # Sums of a few hundred float32 products; angles of up to 255 radians lose 2**-17 of a turn.
    for a, b in zip(got, want, strict=True):
        assert np.abs(a - b).max() <= 1e-4 * np.abs(b).max()
    moved = decode_rows(row, refined, jnp.int32(FIRST + 1), code, profile.rows)
    assert np.abs(moved[0] - want[0]).max() > 1e-2 * np.abs(want[0]).max()
    broken = reference_decode(profile, np.asarray(row) ^ 4, refined)
    assert np.abs(got[0] - broken[0]).max() > 1e-2 * np.abs(want[0]).max()


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_errors_are_half_a_step_where_nothing_is_clipped(dtype):
    profile, code, keys, values, attention = setup(dtype=dtype)
    row, refined = encode(profile, code, keys, values, attention)
    got_keys, got_values = decode_rows(row, refined, jnp.int32(FIRST), code, profile.rows)
    frequency = frequencies(1, 64)[0]
    back = -(FIRST + np.arange(PAGE))
    encode_matrix = np.linalg.inv(profile.decode[0].astype(np.float64))
    z, got = (
        (turn(np.asarray(x, np.float64), back, frequency) - profile.mean[0][:, None])
        @ encode_matrix
        for x in (keys, got_keys)
    )
    step, top = profile.step[0][:, None], 2.0 ** profile.widths[0][:, None] - 1
    coded = np.tile(profile.widths[0][:, None] > 0, (1, PAGE, 1))
    scale = 2 ** ((np.asarray(row, np.float64)[..., -3:-2] - 128) / 8)
    wanted = np.abs(z * np.where(coded, 1 / profile.scale[0][:, None], 0))
    wanted = np.sqrt((wanted**2).sum(-1, keepdims=True) / coded.sum(-1, keepdims=True))
    assert np.all(np.abs(np.log2(scale / wanted)) <= 0.51 / 8)
    coarse = np.arange(PAGE)[None, :, None] != np.asarray(refined)[:, None, :, 0, 0]
    coded &= coarse.all(-1)[..., None]  # refined tokens have steps of their own
    inside = coded & (np.abs(z) < top / 2 * step * scale)
    assert inside.mean() > 0.5
    noise = 1e-5 * np.abs(z).max()  # of float32 sums
    within = np.abs(got - z) <= step * scale * 0.5 + noise
    assert within[inside].all()
    assert not (np.abs(got - z) <= step * scale * 0.25)[inside].all()
    values, got_values = (np.asarray(x, np.float64) for x in (values, got_values))
    assert np.linalg.norm(got_values - values) < 0.25 * np.linalg.norm(values)


def test_the_tokens_that_matter_are_refined():
    profile, code, keys, values, attention = setup()
    attention = attention.at[:, 5].set(1e6).at[:, 9].set(1e5)
    row, refined = encode(profile, code, keys, values, attention)
    assert np.array_equal(
        np.sort(refined[..., 0], axis=1), np.tile([[[5, 5], [9, 9]]], (2, 1, 1)).reshape(2, 2, 2)
    )
    got, plain = (
        np.asarray(decode_rows(row, r, jnp.int32(FIRST), code, profile.rows)[1])
        for r in (refined, refined.at[..., 3:].set(0))
    )
    # Half a step of what the rows left over, in every component, and float32 sums.
    left = np.abs((np.asarray(values) - plain) @ hadamard_matrix(64)).max(-1, keepdims=True)
    bound = left / 127 * (0.5 + 2.0**-7) * np.sqrt(64) + 1e-5
    error = np.abs(got - np.asarray(values))
    assert np.all(error[:, [5, 9]] <= bound[:, [5, 9]])
    assert not np.all(error <= bound)
    exact = jnp.zeros((PAGE,), bool).at[5].set(True)
    _, refined = encode(profile, code, keys, values, attention, exact)
    assert not np.any(np.asarray(refined[..., 0]) == 5)


@pytest.mark.parametrize(("key_bytes", "value_bits"), [(8, 2), (64, 8), (80, 8)])
def test_whoever_is_refined_gains(key_bytes, value_bits):
    """Also where rows have 8 bits and more: a refined row holds what they leave over."""
    profile, _ = make_profile(key_bytes=key_bytes, value_bits=value_bits)
    code = profile.code(jnp.asarray(frequencies(1, 64))).at(0)
    keys, values, attention = setup()[2:]
    row, refined = encode(profile, code, keys, values, attention)

    def errors(refined):
        found = decode_rows(row, refined, jnp.int32(FIRST), code, profile.rows)
        return [
            np.linalg.norm(np.asarray(a - b), axis=-1)
            for a, b in zip(found, (keys, values), strict=True)
        ]

    for kind, (got, plain) in enumerate(
        zip(errors(refined), errors(refined.at[..., 3:].set(0)), strict=True)
    ):
        token = np.asarray(refined[..., kind, 0])
        others = np.ones(got.shape, bool)
        np.put_along_axis(others, token, False, axis=1)
        assert np.array_equal(got[others], plain[others])
        got, plain = (np.take_along_axis(x, token, axis=1) for x in (got, plain))
        # 8 bits of what is left over; in the basis of keys, which is not orthogonal, errors are not
        # quite what they are in the key. Angles of RoPE lose 2**-17 of a turn.
        noise = 1e-4 * np.abs((keys, values)[kind]).max()
        assert np.all(got < 0.1 * plain + noise)
        assert not np.any(plain < 0.1 * plain + noise)


@pytest.mark.parametrize("value", [0.0, 1e-38, 1e-30, 3.0, 1e20, LARGEST])
def test_extreme_pages_stay_finite(value):
    profile, code, _keys, values, attention = setup()
    same = jnp.full_like(values, value)
    row, refined = encode(profile, code, same, same, attention)
    got = decode_rows(row, refined, jnp.int32(FIRST), code, profile.rows)
    assert np.all(np.isfinite(got[0])) and np.all(np.isfinite(got[1]))


def test_jit_and_vmap_change_nothing():
    profile, code, keys, values, attention = setup()
    exact = jnp.zeros((PAGE,), bool)

    def both(keys, values, attention, first):
        coded = encode_rows(keys, values, attention, exact, first, code, profile.rows)
        return coded, decode_rows(*coded, first, code, profile.rows)

    first = jnp.int32(FIRST)
    (row, refined), decoded = both(keys, values, attention, first)
    stacked = [jnp.stack([x, 2 * x]) for x in (keys, values, attention)]
    (rows, refineds), many = jax.jit(jax.vmap(both, in_axes=(0, 0, 0, None)))(*stacked, first)
    # A code may tip over by rounding; almost none does.
    assert np.mean(np.asarray(rows[0]) != np.asarray(row)) < 1e-3
    assert np.mean(np.asarray(refineds[0]) != np.asarray(refined)) < 1e-3
    assert np.mean(np.abs(many[1][0] - decoded[1])) < 1e-4
    assert np.mean(np.abs(many[1][1] - decoded[1])) > 1e-2


@pytest.mark.parametrize(
    ("field", "value"),
    [("key_bytes", 0), ("value_bits", 1), ("value_bits", 9), ("refine_every", 0)],
)
def test_wrong_sizes(field, value):
    with pytest.raises(ValueError, match=f"{field}: expected .* got {value}"):
        RowLayout(**({"key_bytes": 8, "value_bits": 3} | {field: value}))
