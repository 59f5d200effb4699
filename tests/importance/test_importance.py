"""Scores, their normalisation, the weighted sum, top-k and the order inside a page."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from kvcompress_jax.importance import (
    ATTENTIONS,
    MAGNITUDES,
    ImportanceRule,
    ImportanceWeights,
    TokenStatistics,
    importance,
    normalize,
    rank_tokens,
    select_top_k,
    token_error,
)

SCORES = hnp.arrays(
    np.float32, (12, 2), elements=st.floats(-(2.0**100), 2.0**100, width=32, allow_subnormal=False)
)


def statistics(seed=0):
    key = iter(jax.random.split(jax.random.key(seed), 8))
    keys, values = (jax.random.normal(next(key), (16, 3, 8)) for _ in range(2))
    return TokenStatistics(
        keys=keys,
        values=values,
        mass=jax.random.uniform(next(key), (16, 3)) * 10,
        seen=jnp.arange(16, 0, -1).astype(jnp.float32),
        error=jax.random.uniform(next(key), (16, 3)),
    )


def reference(name, s):
    keys, values, mass, seen, error = (
        np.asarray(x, np.float64) for x in (s.keys, s.values, s.mass, s.seen, s.error)
    )
    norm = lambda x: np.sqrt((x**2).sum(-1))  # noqa: E731
    return {
        "specification": np.sqrt((keys**2).sum(-1) + (values**2).sum(-1)),
        "key_norm": norm(keys),
        "inverse_key_norm": -norm(keys),
        "value_norm": norm(values),
        "quantization_error": error,
        "output_error": error * mass / seen[:, None],
        "mean": mass / seen[:, None],
        "sum": mass,
    }[name]


@pytest.mark.parametrize("name", [*MAGNITUDES, *ATTENTIONS])
def test_scores(name):
    s = statistics()
    got = np.asarray((MAGNITUDES | ATTENTIONS)[name](s))
    assert got.shape == (16, 3) and got.dtype == np.float32
    close = lambda want: np.allclose(got, want, rtol=1e-5)  # noqa: E731
    assert close(reference(name, s))
    assert not close(reference(name, statistics(1)))
    others = set(MAGNITUDES | ATTENTIONS) - {name}
    assert not any(close(reference(other, s)) for other in others)


def test_the_mean_does_not_favour_old_tokens():
    s = statistics()
    steady = TokenStatistics(
        keys=s.keys,
        values=s.values,
        mass=jnp.broadcast_to(0.1 * s.seen[:, None], (16, 3)),
        seen=s.seen,
        error=s.error,
    )
    assert np.allclose(ATTENTIONS["mean"](steady), 0.1)
    assert np.all(np.diff(np.asarray(ATTENTIONS["sum"](steady)), axis=0) < 0)


def test_token_error():
    """In float64: |value error| + |key error| / sqrt(dim) * |value|."""
    dk, dv, v = (np.random.default_rng(i).normal(size=(5, 2, 8)) for i in range(3))
    norm = lambda x: np.linalg.norm(x, axis=-1)  # noqa: E731
    want = norm(dv) + norm(dk) / np.sqrt(8) * norm(v)
    got = token_error(*(jnp.asarray(x, jnp.float32) for x in (dk, dv, v)))
    assert np.allclose(got, want, rtol=1e-5)
    assert not np.allclose(got, norm(dv) + norm(dk) * norm(v), rtol=1e-2)


@given(SCORES)
def test_normalized_scores_are_shares_of_the_range(score):
    got = np.asarray(normalize(jnp.asarray(score)), np.float64)
    assert np.all((got >= 0) & (got <= 1))
    for head in range(2):
        column = score[:, head].astype(np.float64)
        if column.max() - column.min() > 2.0**-124:
            want = (column - column.min()) / (column.max() - column.min())
            assert np.allclose(got[:, head], want, atol=1e-4)
            assert got[column.argmax(), head] > 1 - 1e-6 and got[column.argmin(), head] == 0
        elif column.max() == column.min():
            assert np.all(got[:, head] == 0.5)


def test_tokens_that_do_not_count_change_nothing():
    score = jax.random.normal(jax.random.key(0), (10, 2))
    where = jnp.arange(10)[:, None] >= jnp.array([3, 0])[None, :]
    spoiled = jnp.where(where, score, 1e9)
    got = normalize(spoiled, where=where)
    assert np.allclose(got[3:, 0], normalize(score[3:])[:, 0])
    assert not np.asarray(got[:3, 0]).any()
    assert np.asarray(normalize(spoiled))[3:, 0].max() < 1e-6  # as they would have


@given(SCORES, st.permutations(range(12)))
def test_permuting_tokens_permutes_scores(score, order):
    order = np.array(order)
    got = normalize(jnp.asarray(score))
    assert np.isfinite(got).all()
    assert np.array_equal(got[order], normalize(jnp.asarray(score[order])))


def test_the_specifications_sum():
    m, learned, a = (np.random.default_rng(i).uniform(size=(9, 2)) for i in range(3))
    mm = lambda x: (x - x.min(0)) / (x.max(0) - x.min(0))  # noqa: E731
    want = 0.4 * mm(m) + 0.4 * mm(learned) + 0.2 * mm(a)
    f32 = lambda x: jnp.asarray(x, jnp.float32)  # noqa: E731
    got = importance(f32(m), f32(learned), f32(a), ImportanceWeights())
    assert np.allclose(got, want, atol=1e-5)
    # Without a learned score, attention so far predicts attention to come.
    fallback = importance(f32(m), None, f32(a), ImportanceWeights())
    assert np.allclose(fallback, 0.4 * mm(m) + 0.6 * mm(a), atol=1e-5)
    assert not np.allclose(fallback, want, atol=1e-2)


@pytest.mark.parametrize("ratio", [0.01, 0.3, 0.5, 1.0])
def test_top_k_is_exact_and_of_equals_takes_the_first(ratio):
    score = jnp.round(jax.random.uniform(jax.random.key(0), (64, 5)) * 4)
    got = np.asarray(select_top_k(score, ratio))
    k = max(1, round(ratio * 64))
    assert np.all(got.sum(0) == k)
    want = np.zeros((64, 5), bool)
    for head in range(5):
        order = sorted(range(64), key=lambda t: (-float(score[t, head]), t))
        want[order[:k], head] = True
    assert np.array_equal(got, want)
    if k < 64:
        assert not np.array_equal(got, np.asarray(select_top_k(-score, ratio)))


@pytest.mark.parametrize("ratio", [0, -0.5, 1.5, float("nan")])
def test_wrong_ratios(ratio):
    with pytest.raises(ValueError, match="ratio: expected more than 0 and at most 1, got"):
        select_top_k(jnp.ones((4, 1)), ratio)


def test_rank_is_by_importance_times_error():
    weight, error = (np.random.default_rng(i).uniform(size=(32, 3)) for i in range(2))
    got = np.asarray(rank_tokens(jnp.asarray(weight, jnp.float32), jnp.asarray(error, jnp.float32)))
    assert np.array_equal(got, np.argsort(-(weight * error), axis=0, kind="stable"))
    assert not np.array_equal(got, np.argsort(-weight, axis=0, kind="stable"))
    ties = np.asarray(rank_tokens(jnp.ones((8, 1)), jnp.ones((8, 1))))
    assert np.array_equal(ties[:, 0], np.arange(8))


@pytest.mark.parametrize(
    "weights",
    [
        {"magnitude": -0.1},
        {"learned": float("inf")},
        {"magnitude": 0.0, "learned": 0.0, "attention": 0.0},
    ],
)
def test_wrong_weights(weights):
    with pytest.raises(ValueError, match="weights: expected finite numbers, none negative"):
        ImportanceWeights(**weights)


@pytest.mark.parametrize(("field", "name"), [("magnitude", "size"), ("attention", "max")])
def test_unknown_scores(field, name):
    with pytest.raises(ValueError, match=f"{field}: expected one of .*, got '{name}'"):
        ImportanceRule(**{field: name})
