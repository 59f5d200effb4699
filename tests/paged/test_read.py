"""Sealed pages are opened alike by the kernel for CPUs and by XLA."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kvcompress_jax.config import CompressionConfig
from kvcompress_jax.paged import decode_pages
from tests.paged.batch import make_batch

# page size, channels, share of the fine plane, bits of a refined token
CASES = [
    (16, 64, 0.5, 4),
    (16, 64, 0.5, 2),
    (16, 96, 0.2, 2),
    (32, 128, 1.0, 4),
    (64, 256, 0.5, 2),
    (64, 64, 0.3, 4),
]


@functools.partial(jax.jit, static_argnames=("dtype", "implementation"))
def opened(cache, ids, live, *, dtype, implementation):
    return decode_pages(cache, 1, ids, live, dtype=jnp.dtype(dtype), implementation=implementation)


def same(a, b):
    return all(x.tobytes() == y.tobytes() for x, y in zip(*jax.device_get((a, b)), strict=True))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize(("page_size", "dim", "ratio", "fine_bits"), CASES)
def test_to_the_bit_cpu(page_size, dim, ratio, fine_bits, dtype):
    config = CompressionConfig(
        page_size=page_size, window_tokens=page_size, ratio=ratio, fine_bits=fine_bits
    )
    batch = make_batch(config, [5, 7 * page_size - 3], head_dim=dim, dtype="bfloat16")
    table = batch.table()
    ids = jnp.asarray(table.sealed)
    live = np.arange(ids.shape[1])[None, :] < np.asarray(table.sealed_count)[:, None]
    assert live.any() and not live.all()
    of = functools.partial(opened, ids=ids, live=live, dtype=dtype)
    keys, values = got = of(batch.cache, implementation="cpu")
    assert same(got, of(batch.cache, implementation="xla"))
    assert keys.shape == values.shape == (*ids.shape, 2, page_size, dim)
    assert not np.asarray(keys[~live]).any() and np.asarray(keys[live]).any()
    # The judge sees another code of a token, in either plane, and another scale.
    for name, x in (("base", batch.cache.base ^ 1), ("fine", batch.cache.fine ^ 0x40)):
        other = dataclasses.replace(batch.cache, **{name: x.astype(jnp.uint8)})
        assert not same(of(other, implementation="cpu"), got)
    scale = dataclasses.replace(batch.cache.key_scale, step=2 * batch.cache.key_scale.step)
    assert not same(
        of(dataclasses.replace(batch.cache, key_scale=scale), implementation="cpu"), got
    )


def test_a_name_never_falls_back():
    batch = make_batch(CompressionConfig(page_size=16), [40], head_dim=80)
    ids = jnp.zeros((1,), jnp.int32)
    with pytest.raises(NotImplementedError, match=r"decode_pages: cpu: .* multiples of 32 and 16"):
        decode_pages(batch.cache, 0, ids, implementation="cpu")
    assert decode_pages(batch.cache, 0, ids)[0].shape == (1, 2, 16, 80)
