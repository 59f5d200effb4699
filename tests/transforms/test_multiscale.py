"""The specification's decomposition, exact to rounding."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kvcompress_jax.transforms import multi_scale_compose, multi_scale_decompose

EPS = float(jnp.finfo(jnp.float32).eps)


def exact(x, back):
    """Normalising, at most five sums of two on the way down and up, and rescaling: some 16
    roundings of numbers no larger than the vector's norm."""
    x = np.asarray(x, np.float64)
    norm = np.linalg.norm(x, axis=-1, keepdims=True)
    return bool(np.all(np.abs(np.asarray(back, np.float64) - x) <= 16 * EPS * norm))


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
@pytest.mark.parametrize("dim", [64, 96, 128, 256])
def test_compose_undoes_decompose(dim, dtype):
    x = jax.random.normal(jax.random.key(0), (5, 3, dim), jnp.float32).astype(dtype)
    parts = jax.jit(multi_scale_decompose)(x)
    back = jax.jit(multi_scale_compose)(parts)
    assert exact(x, back)
    for broken in (
        dataclasses.replace(parts, magnitude=parts.magnitude * 1.0001),
        dataclasses.replace(parts, residual=-parts.residual),
        dataclasses.replace(parts, components=(parts.components[0] * 1.001, *parts.components[1:])),
    ):
        assert not exact(x, multi_scale_compose(broken))


@pytest.mark.parametrize("dim", [64, 96])
def test_parts_are_what_they_say(dim):
    x = jax.random.normal(jax.random.key(1), (7, dim), jnp.float32)
    parts = multi_scale_decompose(x)
    x64 = np.asarray(x, np.float64)
    norm = np.linalg.norm(x64, axis=-1)
    assert np.allclose(parts.magnitude, norm, rtol=8 * EPS)
    assert np.allclose(parts.direction, x64 / norm[:, None], atol=8 * EPS)
    sizes = [c.shape[-1] for c in parts.components]
    assert sizes == [dim // 32, *(dim // 2**k for k in range(5, 1, -1))]
    assert parts.residual.shape == (7, dim // 2)
    # Orthonormal: the energy of the parts is that of the direction, and no band's is lost.
    energy = sum(np.sum(np.asarray(c, np.float64) ** 2, -1) for c in parts.components)
    rest = np.sum(np.asarray(parts.residual, np.float64) ** 2, -1)
    assert np.allclose(energy + rest, 1, atol=64 * EPS)
    assert not np.allclose(energy, 1, atol=0.01)


def test_bands_go_from_coarse_to_fine():
    """A constant vector is all in the coarsest band, an alternating one all in the residual."""
    constant = multi_scale_decompose(jnp.ones((64,)))
    assert np.allclose(np.sum(np.square(constant.components[0])), 1)
    alternating = multi_scale_decompose(jnp.tile(jnp.array([1.0, -1.0]), 32))
    assert np.allclose(np.sum(np.square(alternating.residual)), 1)


@pytest.mark.parametrize("size", [1e-30, 1e-20, 1.0, 1e20, 1e30])
def test_any_range(size):
    x = jax.random.normal(jax.random.key(2), (4, 64), jnp.float32) * np.float32(size)
    assert exact(x, multi_scale_compose(multi_scale_decompose(x)))


def test_zeros():
    parts = multi_scale_decompose(jnp.zeros((2, 64)))
    assert not any(np.asarray(leaf).any() for leaf in jax.tree.leaves(parts))
    assert not np.asarray(multi_scale_compose(parts)).any()


@pytest.mark.parametrize(("dim", "bands"), [(64, 0), (64, 7), (96, 6), (33, None)])
def test_errors(dim, bands):
    with pytest.raises(ValueError, match=f"bands: expected 1 to . for dim {dim}, got"):
        multi_scale_decompose(jnp.ones((dim,)), bands=bands)


@pytest.mark.parametrize("bands", [1, 3, 6])
def test_any_number_of_bands(bands):
    x = jax.random.normal(jax.random.key(3), (4, 64), jnp.float32)
    parts = multi_scale_decompose(x, bands=bands)
    assert len(parts.components) == bands
    assert exact(x, multi_scale_compose(parts))
