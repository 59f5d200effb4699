"""Error feedback, against its definition in float64."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kvcompress_jax.codec import Scale, decode, encode, encode_bytes, fit_scale
from kvcompress_jax.feedback import (
    KeyFeedback,
    PageFeedback,
    at_position,
    block_pairs,
    encode_with_feedback,
    fit,
    fit_feedback,
)
from kvcompress_jax.feedback.code import RANK
from kvcompress_jax.feedback.fit import turned_mean

HEADS, TOKENS = 2, 32


def rotation(frequencies, position):
    """f64[dim, dim]: what RoPE does at a position."""
    angle = np.asarray(frequencies, np.float64) * position
    cos, sin = np.diag(np.cos(angle)), np.diag(np.sin(angle))
    return np.block([[cos, -sin], [sin, cos]])


def frequencies_of(dim):
    return 1e4 ** (-2 * np.arange(dim // 2) / dim)


def queries_of(dim, seed=0):
    """f64[heads, 400, dim]: mostly one direction, a few more, and a little of everything."""
    rng = np.random.default_rng(seed)
    mean = rng.normal(size=(HEADS, 1, dim))
    few = rng.normal(size=(HEADS, 400, 2)) @ rng.normal(size=(HEADS, 2, dim))
    return 2 * mean + few + 0.3 * rng.normal(size=(HEADS, 400, dim))


@functools.cache
def fitted(dim):
    """Feedback of one layer for `queries_of` at the position of the key."""
    q = queries_of(dim)
    moment = np.einsum("hnd,hne->hde", q, q)[None] / q.shape[1]
    step = np.full((1, HEADS, dim // 2), 0.3)
    step[..., -2] *= 8 / 2**0.5  # the outlier of `page`, and the channel that it is paired with
    return fit_feedback(moment, step, frequencies_of(dim)[None], windows=(1,))  # no distance


def page(dim, seed=1):
    x = jax.random.normal(jax.random.key(seed), (HEADS, TOKENS, dim)).at[..., -2].mul(8.0)
    return x.astype(jnp.bfloat16)


def one_layer(feedback, position=0):
    turned = at_position(feedback, jnp.int32(position))
    return jax.tree.map(lambda x: x[0], turned)


@jax.jit
def _encode(x, scale, cells, feedback):
    """Base and fine."""
    cells = jnp.broadcast_to(jnp.asarray(cells, jnp.float32), x.shape[:2])
    code = encode_with_feedback(x, scale, cells, feedback)
    return code >> jnp.uint8(4), code & jnp.uint8(15)


def as_defined(x, scale, cells, feedback):
    """Positions of the codes in steps, channel block by channel block, in float64, and for each how
    far its target is from a border between two codes, in cells."""
    x = np.asarray(x, np.float64)
    step, zero = (np.asarray(s, np.float64) for s in (scale.step, scale.zero))
    carry, answer = (np.asarray(a, np.float64) for a in (feedback.carry, feedback.answer))
    heads, tokens, dim = x.shape
    half, pairs = dim // 2, block_pairs(dim)
    codes, margin = np.zeros(x.shape), np.zeros(x.shape)
    for h in range(heads):
        for t in range(tokens):
            debt = np.zeros(carry.shape[-1])
            for start in range(half - pairs, -1, -pairs):
                after = debt.copy()
                for j in range(2):
                    for p in range(start, start + pairs):
                        d = j * half + p
                        owed, n = answer[h, j, p] @ debt, cells[h, t]
                        at = n * ((x[h, t, d] - owed) / step[h, d] - zero[h, d]) + 0.5
                        ends = (0, 15) if n == 1 else (-n / 2, 15 * n + n / 2 - 1)
                        codes[h, t, d] = np.clip(np.floor(at), *ends) / n
                        margin[h, t, d] = abs(at - np.round(at))
                        error = (codes[h, t, d] + zero[h, d]) * step[h, d] - x[h, t, d]
                        after += carry[h, j, p] * error
                debt = after
    return codes, margin


def agrees(got, expected, margin):
    """Whether tokens have the same codes. One that comes within 2**-11 of a cell of a border may be
    rounded the other way in float32, and all that its error is fed to with it: such tokens do not
    count, and are few."""
    decided = np.all(margin > 2.0**-11, axis=-1)
    assert decided.mean() > 0.9
    return bool(np.all((np.asarray(got) == expected)[decided]))


@pytest.mark.parametrize("dim", [16, 64, 96, 20])
def test_codes_are_those_of_the_definition(dim):
    x, feedback = page(dim), one_layer(fitted(dim), 77)
    scale = fit_scale(x, axis=-2)
    cells = 4.0 ** np.random.default_rng(2).integers(0, 3, (HEADS, TOKENS))  # 1, 4 or 16
    expected, margin = as_defined(x, scale, cells, feedback)

    def positions(base, fine):
        return np.asarray(base) + np.where(cells[..., None] > 1, np.asarray(fine) - 8.0, 0.0) / 16

    codes = _encode(x, scale, cells, feedback)
    assert agrees(positions(*codes), expected, margin)
    # The judge says no to the nearest codes, and to feedback for another position.
    nearest = encode_bytes(x, scale, axis=-2, cells=jnp.asarray(cells, jnp.float32)[..., None])
    assert not agrees(positions(nearest >> 4, nearest & 15), expected, margin)
    other = as_defined(x, scale, cells, one_layer(fitted(dim), 0))[0]
    assert not agrees(positions(*codes), other, margin)


def logit_error(x, scale, codes, queries):
    """Mean square of `q . (x' - x)`, in float64."""
    error = np.asarray(decode(codes, scale, axis=-2), np.float64) - np.asarray(x, np.float64)
    return np.mean(np.einsum("hnd,htd->hnt", queries, error) ** 2)


def test_logits_are_closer_than_with_the_nearest_codes():
    dim = 64
    x = page(dim)
    scale = fit_scale(x, axis=-2)
    fed, _ = _encode(x, scale, 1, one_layer(fitted(dim)))
    nearest, _ = encode(x, scale, axis=-2, cells=1)
    queries = queries_of(dim)
    assert logit_error(x, scale, fed, queries) < 0.2 * logit_error(x, scale, nearest, queries)
    # Of queries that lie elsewhere, it is not: what is gained here is lost there.
    others = queries_of(dim, seed=5)
    assert logit_error(x, scale, fed, others) > 0.8 * logit_error(x, scale, nearest, others)


def test_what_a_block_owes_is_the_best_that_earlier_errors_allow(monkeypatch):
    """`answer carry'` are the coefficients of block LDL, H_rr^-1 H_rd of what is left and what is
    done, for a moment that is diagonal plus low rank; in float64."""
    monkeypatch.setattr(fit, "ROUNDS", 1000)
    dim, half = 16, 8
    rng = np.random.default_rng(0)
    v = rng.normal(size=(HEADS, dim, RANK))
    diagonal = rng.uniform(0.5, 2.0, size=(HEADS, half))
    hessian = v @ v.swapaxes(-1, -2) + np.stack([np.diag(np.concatenate([d, d])) for d in diagonal])
    step = rng.uniform(0.2, 0.9, size=(1, HEADS, half))
    found = fit_feedback(hessian[None], step, np.zeros((1, half)))
    carry, answer = (
        np.asarray(a, np.float64)[0].reshape(HEADS, dim, RANK) for a in (found.carry, found.answer)
    )
    pairs = block_pairs(dim)
    for h in range(HEADS):
        for start in range(half - 2 * pairs, -1, -pairs):
            block = np.r_[start : start + pairs, half + start : half + start + pairs]
            rest = np.r_[0 : start + pairs, half : half + start + pairs]
            done = np.setdiff1d(np.arange(dim), rest)
            best = np.linalg.solve(hessian[h][np.ix_(rest, rest)], hessian[h][np.ix_(rest, done)])
            best = best[np.isin(rest, block)]
            owed = answer[h, block] @ carry[h, done].T
            np.testing.assert_allclose(owed, best, atol=1e-3 * np.abs(best).max())
            assert np.abs(best).max() > 0.05


def test_the_mean_over_distances_is_the_mean_of_the_turned():
    rng = np.random.default_rng(0)
    root = rng.normal(size=(HEADS, 12, 12))
    moment, frequencies = root @ root.swapaxes(-1, -2), frequencies_of(12)
    expected = np.mean([(r := rotation(frequencies, t)) @ moment @ r.T for t in range(50)], axis=0)
    np.testing.assert_allclose(turned_mean(moment, frequencies, 50), expected, atol=1e-12)
    assert np.abs(turned_mean(moment, frequencies, 49) - expected).max() > 1e-3


def test_a_page_is_fed_in_the_frame_of_its_position():
    dim, position = 16, 1000
    q = queries_of(dim)
    moment = np.einsum("hnd,hne->hde", q, q)[None] / q.shape[1]
    found = fit_feedback(moment, np.ones((1, HEADS, dim // 2)), frequencies_of(dim)[None])
    turned = at_position(found, jnp.int32(position))
    turn = rotation(frequencies_of(dim), position)
    for name in ("carry", "answer"):
        plain, got = (np.asarray(getattr(x, name), np.float64) for x in (found, turned))
        flat = [x[0].reshape(HEADS, dim, -1) for x in (plain, got)]
        # The angle is a float32: 1000 radians are off by 2**-15 of one.
        np.testing.assert_allclose(turn @ flat[0], flat[1], atol=1e-3 * np.abs(flat[0]).max())
        assert np.abs(flat[0] - flat[1]).max() > 0.1 * np.abs(flat[0]).max()


def test_queries_without_a_direction_change_nothing_much():
    """White queries: every error counts alike, and the nearest codes are the best."""
    dim = 64
    feedback = fit_feedback(
        np.eye(dim)[None, None].repeat(HEADS, 1),
        np.ones((1, HEADS, dim // 2)),
        frequencies_of(dim)[None],
    )
    x = page(dim)
    scale = fit_scale(x, axis=-2)
    base, _ = _encode(x, scale, 1, one_layer(feedback))
    assert np.array_equal(base, encode(x, scale, axis=-2, cells=1)[0])


def test_numbers_of_any_size_have_codes():
    dim = 64
    x = page(dim).astype(jnp.float32) * jnp.float32(1e37)
    scale = fit_scale(x, axis=-2)
    strong = jax.tree.map(lambda a: a * 1e6, one_layer(fitted(dim)))
    base, _ = _encode(x, scale, 1, strong)
    assert np.isfinite(decode(base, scale, axis=-2)).all()
    assert np.asarray(base).max() <= 15


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"step": np.ones((1, HEADS, 4))}, "step and frequencies: expected"),
        ({"moment": np.full((1, HEADS, 16, 16), np.nan)}, "moment and step: expected finite"),
    ],
)
def test_bad_input_is_one_line(change, message):
    right = {
        "moment": np.eye(16)[None, None].repeat(HEADS, 1),
        "step": np.ones((1, HEADS, 8)),
        "frequencies": np.zeros((1, 8)),
    }
    with pytest.raises(ValueError, match=message):
        fit_feedback(**right | change)


def test_types_are_pytrees():
    feedback = fitted(16)
    assert isinstance(feedback, KeyFeedback)
    leaves = jax.tree.leaves(feedback)
    assert [x.shape for x in leaves] == [(1, HEADS, 2, 8, 4)] * 2 + [(1, 8)]
    assert dataclasses.is_dataclass(PageFeedback)
    assert isinstance(one_layer(feedback), PageFeedback)
    assert isinstance(fit_scale(page(16), axis=-2), Scale)
