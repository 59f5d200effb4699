"""Laws that every transform obeys."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kvcompress_jax.transforms import center, chain, hadamard_matrix, identity, rotate

DIMS = [64, 96, 128, 256]
EPS = float(jnp.finfo(jnp.float32).eps)

TRANSFORMS = {
    "identity": lambda dim: identity(),
    "center": lambda dim: center(),
    "rotate": rotate,
    "rotate-signs": lambda dim: rotate(dim, seed=3),
    "chain": lambda dim: chain(center(), rotate(dim, seed=1), rotate(dim)),
}


def sample(dim, dtype=jnp.float32):
    x = jax.random.normal(jax.random.key(dim), (32, 3, dim), jnp.float32)
    return x.at[..., 2].mul(30.0).at[..., 5].add(50.0).astype(dtype)


def inverts(x, back, dim):
    """A product with an orthonormal matrix sums dim terms, each rounded; twice for a round trip
    and twice for the longest chain."""
    bound = (
        4 * np.sqrt(dim) * EPS * np.linalg.norm(np.asarray(x, np.float64), axis=-1, keepdims=True)
    )
    return bool(np.all(np.abs(np.asarray(back, np.float64) - np.asarray(x, np.float64)) <= bound))


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
@pytest.mark.parametrize("dim", DIMS)
@pytest.mark.parametrize("name", TRANSFORMS)
def test_decode_undoes_encode(name, dim, dtype):
    transform, x = TRANSFORMS[name](dim), sample(dim, dtype)
    state = transform.init(x)
    y = transform.encode(state, x)
    back = transform.decode(state, y)
    assert y.dtype == back.dtype == jnp.float32
    assert y.shape == back.shape == x.shape
    assert inverts(x, back, dim)
    assert not inverts(x, back.at[3, 1, 4].add(0.01), dim)
    if name != "identity":
        assert not inverts(x, y, dim)


@pytest.mark.parametrize("name", TRANSFORMS)
def test_jit_and_vmap_change_nothing(name):
    transform, x = TRANSFORMS[name](64), sample(64)
    state = transform.init(x)
    y = transform.encode(state, x)
    for jitted, plain in (
        (jax.jit(transform.encode)(state, x), y),
        (jax.jit(transform.decode)(state, y), transform.decode(state, y)),
        (jax.vmap(transform.encode, in_axes=(None, 0))(state, jnp.stack([x, 2 * x]))[0], y),
    ):
        scale = np.abs(np.asarray(plain)).max()
        assert np.abs(np.asarray(jitted) - np.asarray(plain)).max() <= 64 * EPS * scale
    structure = jax.tree.structure(state)
    assert jax.tree.structure(jax.jit(transform.init)(x)) == structure


def test_chain_is_composition():
    x = sample(64)
    first, second = center(), rotate(64, seed=1)
    both = chain(first, second)
    state = both.init(x)
    centred = first.encode(first.init(x), x)
    want = second.encode(second.init(centred), centred)
    assert np.array_equal(both.encode(state, x), want)
    swapped = chain(second, first)
    assert not np.allclose(swapped.encode(swapped.init(x), x), want)
    assert np.array_equal(chain().encode((), x), x)


def test_center_takes_the_mean_away():
    x = sample(96)
    y = np.asarray(center().encode(center().init(x), x), np.float64)
    scale = np.abs(np.asarray(x, np.float64)).max(axis=0)
    assert np.all(np.abs(y.mean(axis=0)) <= 32 * EPS * scale)
    assert not np.all(np.abs(np.asarray(x, np.float64).mean(axis=0)) <= 32 * EPS * scale)


@pytest.mark.parametrize("n", [1, 2, 12, 20, 24, 40, 64, 80, 96, 128, 192, 256, 512])
def test_hadamard_matrices(n):
    def is_hadamard(h):
        flat = np.allclose(np.abs(h), n**-0.5, rtol=1e-12, atol=0)
        return flat and np.allclose(h @ h.T, np.eye(n), atol=1e-12)

    h = hadamard_matrix(n)
    assert is_hadamard(h)
    if n > 1:
        broken = h.copy()
        broken[0, 0] *= -1
        assert not is_hadamard(broken)
        assert not is_hadamard(h * 1.001)


@pytest.mark.parametrize("n", [0, 3, 28, 36, 100])
def test_no_such_hadamard_matrix(n):
    with pytest.raises(ValueError, match=rf"n: expected 2\*\*k, 12 \* 2\*\*k .*, got {n}"):
        hadamard_matrix(n)


def test_rotation_spreads_an_outlier_and_keeps_products():
    x = jnp.zeros((1, 1, 96)).at[..., 7].set(10.0)
    y = np.asarray(rotate(96, seed=0).encode((), x))
    assert np.allclose(np.abs(y), 10 * 96**-0.5)
    q, k = sample(96)[:4], sample(96)[4:8]
    transform = rotate(96, seed=5)
    before = np.einsum("thd,thd->th", q, k)
    after = np.einsum("thd,thd->th", transform.encode((), q), transform.encode((), k))
    assert np.allclose(before, after, rtol=1e-4)
    other = rotate(96, seed=6).encode((), k)
    assert not np.allclose(
        before, np.einsum("thd,thd->th", transform.encode((), q), other), rtol=0.1
    )


def test_rotate_names_the_wrong_shape():
    with pytest.raises(ValueError, match=r"x: expected \[..., 64\], got \[32, 3, 96\]"):
        rotate(64).init(sample(96))
