"""Sealing by the kernels, the GPU's interpreted, leaves the same cache as sealing in XLA."""

import dataclasses
import functools
import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kvcompress_jax.config import CompressionConfig
from kvcompress_jax.feedback import fit_feedback
from kvcompress_jax.kernels import dispatch
from kvcompress_jax.paged import PoolSizes, Sealing, init_cache, seal
from kvcompress_jax.paged.seal import IMPLEMENTATIONS, seal_xla
from kvcompress_jax.paged.seal_kernels import seal_cpu, seal_triton
from tests.paged.batch import poison

pytestmark = pytest.mark.slow

LAYERS, PAGES = 2, 5
KERNELS = {"triton": functools.partial(seal_triton, interpret=True), "cpu": seal_cpu}


def make_feedback():
    """As of queries that mostly point one way, which differs between layers and heads."""
    rng = np.random.default_rng(0)
    q = 2 * rng.normal(size=(LAYERS, 2, 1, 64)) + 0.3 * rng.normal(size=(LAYERS, 2, 50, 64))
    moment = np.einsum("lhnd,lhne->lhde", q, q) / 50
    frequencies = np.tile(1e4 ** (-np.arange(32) / 32), (LAYERS, 1))
    return fit_feedback(moment, np.full((LAYERS, 2, 32), 0.3), frequencies)


def make_cache(shadow_pages=0, feedback=None, **changes):
    config = CompressionConfig(page_size=16, fine_bits=4)
    layout = config.layout(layers=LAYERS, kv_heads=2, head_dim=64)
    layout = dataclasses.replace(layout, **changes)
    sizes = PoolSizes(
        raw_pages=4,
        sealed_pages=PAGES,
        fine_chunks=8 if layout.fine_rows else 0,
        sink_slots=2,
        shadow_pages=shadow_pages,
    )
    cache = init_cache(layout, sizes, feedback=feedback)
    cache = dataclasses.replace(poison(cache), feedback=cache.feedback)
    keys = jax.random.split(jax.random.key(0), 2)
    raw = jax.random.normal(keys[0], cache.raw.shape).at[:, :, 0, :, :, 1].mul(20.0)
    return dataclasses.replace(
        cache,
        raw=raw.astype(cache.raw.dtype).at[1, 1, 1, 0, 3, 5].set(jnp.inf),
        mass=jax.random.uniform(keys[1], cache.mass.shape),
        seen=jnp.full_like(cache.seen, 9.0),
        sealed=jnp.ones_like(cache.sealed),
        heat=jnp.ones_like(cache.heat),
    )


def work(shadow=None):
    chunks = [[0, 3], [1, 2], [-1, 5], [-1, -1]]
    return Sealing(
        raw=jnp.array([0, 1, 2, -1], jnp.int32),
        page=jnp.array([3, 2, 1, -1], jnp.int32),
        chunks=jnp.array(chunks, jnp.int32),
        first=jnp.zeros((4,), jnp.int32),
        sink=jnp.array([1, -1, -1, -1], jnp.int32),
        count=jnp.int32(3),
        shadow=shadow,
    )


def same(a, b):
    """Caches are equal, byte for byte, but for the page and the chunks of what was refused."""
    codes = ("base", "order", "key_scale", "value_scale")
    assert a.layout == b.layout
    for field in (f for f in dataclasses.fields(a) if not f.metadata.get("static")):
        x, y = jax.tree.leaves(getattr(a, field.name)), jax.tree.leaves(getattr(b, field.name))
        for left, right in zip(x, y, strict=True):
            left, right = np.asarray(left), np.asarray(right)
            if field.name in codes:
                left, right = np.delete(left, 2, axis=1), np.delete(right, 2, axis=1)
            if field.name == "fine":
                left, right = (np.delete(z, [1, 2], axis=0) if z.size else z for z in (left, right))
            if left.tobytes() != right.tobytes():
                return field.name
    return None


@pytest.mark.parametrize(
    "change", [{}, {"fine_rows": 0}, {"fine_bits": 2}, {"fine_bits": 2, "fine_rows": 4}], ids=str
)
@pytest.mark.parametrize("kernel", KERNELS)
def test_the_cache_is_the_same(kernel, change):
    cache, shadow = make_cache(**change), None
    if not change:
        cache, shadow = make_cache(shadow_pages=2), jnp.array([1, -1, 0, -1], jnp.int32)
    want = jax.jit(seal_xla)(cache, work(shadow))
    got = jax.jit(KERNELS[kernel])(cache, work(shadow))
    assert same(got, want) is None
    assert np.array_equal(got.sealed, [True, True, False, True, True])
    assert int(got.rejected) == 1
    # The judge sees another order, a sink that was not written, and a heat that was kept.
    assert same(got, dataclasses.replace(want, order=want.order[..., ::-1])) == "order"
    assert same(got, dataclasses.replace(want, sinks=cache.sinks)) == "sinks"
    assert same(got, dataclasses.replace(want, heat=cache.heat)) == "heat"


@pytest.mark.parametrize("fine_bits", [4, 2])
@pytest.mark.parametrize("kernel", KERNELS)
def test_keys_are_fed_back_alike(kernel, fine_bits):
    cache = make_cache(feedback=make_feedback(), fine_bits=fine_bits)
    sealing = dataclasses.replace(work(), first=jnp.array([0, 640, 64, 0], jnp.int32))
    want = jax.jit(seal_xla)(cache, sealing)
    got = jax.jit(KERNELS[kernel])(cache, sealing)

    def without_keys(cache):
        base, fine = cache.base.at[:, :, 0].set(0), cache.fine.at[:, 0].set(0)
        return dataclasses.replace(cache, base=base, fine=fine)

    def keys(cache):
        base = np.delete(np.asarray(cache.base[:, :, 0]), 2, axis=1)
        fine = np.asarray(cache.fine[:, 0])[[0, 3, 5]]  # of what was not refused
        return np.concatenate([base.ravel(), fine.ravel()])

    def differ(a, b):
        return np.mean(keys(a) != keys(b))

    assert same(without_keys(got), without_keys(want)) is None
    # Sums of float32 may round the other way: see tests/kernels/test_seal_page.py.
    assert differ(got, want) < 0.01
    plain = jax.jit(seal_xla)(dataclasses.replace(cache, feedback=None), sealing)
    assert differ(got, plain) > 0.02
    elsewhere = jax.jit(seal_xla)(cache, work())
    assert differ(got, elsewhere) > 0


def test_feedback_must_fit_the_layout():
    feedback = make_feedback()
    other = dataclasses.replace(feedback, carry=feedback.carry[:1])
    with pytest.raises(
        ValueError, match=r"^feedback: expected \[2, 2, 2, 32\] .*, got \[1, 2, 2, 32\]"
    ):
        make_cache(feedback=other)


def test_names_never_fall_back():
    cache = make_cache()
    with pytest.raises(NotImplementedError, match=r"^seal: triton: expected a CUDA device"):
        seal(cache, work(), implementation="triton")
    with pytest.raises(ValueError, match=r"implementation: expected one of .*, got 'cuda'"):
        seal(cache, work(), implementation="cuda")
    assert list(IMPLEMENTATIONS) == ["triton", "cpu", "xla"]  # the fastest first


def test_a_gpu_without_its_kernel_is_logged(monkeypatch, caplog):
    def refuse():
        raise NotImplementedError("head_dim 80")

    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    with caplog.at_level(logging.WARNING):
        assert dispatch.dispatch("op", {"triton": refuse, "xla": lambda: 7}, None) == 7
    assert "op: triton: head_dim 80" in caplog.text
