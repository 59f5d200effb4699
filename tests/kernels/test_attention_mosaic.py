"""`decode_attention` on Mosaic GPU, interpreted, against dense float64 attention that reads the
same bytes; NaN in all that must not be read."""

import functools

import jax
import jax.numpy as jnp
import pytest

from kvcompress_jax.config import CompressionConfig
from kvcompress_jax.kernels.decode_attention import decode_attention, mosaic
from kvcompress_jax.kernels.decode_attention.mosaic import attention_mosaic
from kvcompress_jax.paged import attend
from kvcompress_jax.paged.attention_kernels import kernel_inputs
from tests.kernels.test_attention import check_kernels, run
from tests.paged.batch import make_batch
from tests.paged.test_attention import check_nan

# page size, dim, group, queries, dtype, ratio of refined tokens, options
CASES = {
    "llama": (64, 128, 4, 1, "bfloat16", 0.5, {"fine_bits": 4}),
    "window-cap": (
        *(64, 128, 2, 3, "float16", 0.5),
        {"window": 70, "soft_cap": 2.0, "fine_bits": 4},
    ),
    "all-refined": (64, 256, 7, 1, "float16", 1.0, {}),
    "large-pages": (128, 128, 16, 1, "bfloat16", 0.5, {"fine_bits": 4}),
}
SETTINGS = {"window": None, "soft_cap": None, "return_mass": False}

needs_mosaic = pytest.mark.skipif(
    jax.__version_info__[:2] < mosaic.OLDEST_JAX, reason="Mosaic GPU's mma comes with jax 0.12"
)


@needs_mosaic
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_kernel(case):
    interpreted = functools.partial(attention_mosaic, programs=8, interpret=True)
    check_kernels(case, (interpreted,), pages=5)


@needs_mosaic
def test_nan_is_handed_on():
    kernel = functools.partial(attention_mosaic, programs=8, interpret=True)
    config = CompressionConfig(page_size=64, window_tokens=64, fine_bits=4)
    check_nan(lambda batch, q: run(batch, q, [2, 2], 0.1, kernel=kernel), config, head_dim=128)


def test_what_it_refuses(monkeypatch):
    def refused(reason, *, page_size=64, dim=128, group=4, dtype="bfloat16", **settings):
        settings = {"fine_bits": 4} | settings
        config = CompressionConfig(page_size=page_size, window_tokens=page_size, **settings)
        batch = make_batch(config, [9], head_dim=dim, dtype=dtype, settle=False)
        pools, lists = kernel_inputs(batch.cache, batch.table())
        q, one = jnp.zeros((1, 1, 2 * group, dim), dtype), jnp.ones((1,), jnp.int32)
        with pytest.raises(NotImplementedError, match=reason):
            attention_mosaic(q, pools, 0, lists, query_lengths=one, scale=1.0, **SETTINGS)
        return batch, q, pools, lists, one

    with monkeypatch.context() as patched:
        patched.setattr(mosaic, "OLDEST_JAX", (99, 1))
        refused(f"jax: expected 99.1 or newer, got {jax.__version__}")
    monkeypatch.setattr(mosaic, "OLDEST_JAX", (0, 0))  # the rest is the same for all
    refused("raw: expected bfloat16 or float16, got float32", dtype="float32")
    refused(r"page_size: expected one of \(64, 128\), got 32", page_size=32)
    refused(r"dim: expected one of \(128, 256\), got 96", dim=96)
    refused(r"fine_rows: expected one of \(0, 32, 64, 128\), got 16", ratio=0.25)
    refused("fine_bits: expected 4, got 2", fine_bits=2)
    refused(r"q: expected at most 8 queries .* where dim is 256, got 9", dim=256, group=9)
    monkeypatch.setattr(mosaic, "_capability", lambda: (8, 0))
    batch, q, pools, lists, one = refused("device: expected sm_90 or newer, got sm_80")
    # A name reaches it, and does not fall back.
    with pytest.raises(NotImplementedError, match="mosaic_gpu: expected a CUDA device, got cpu"):
        attend(q, batch.cache, 0, batch.table(), implementation="mosaic_gpu")
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    with pytest.raises(NotImplementedError, match=r"attend: mosaic_gpu: .*got sm_80"):
        attend(q, batch.cache, 0, batch.table(), implementation="mosaic_gpu")
    with pytest.raises(NotImplementedError, match="decode_attention: mosaic_gpu: device: "):
        decode_attention(
            q, pools, 0, lists, query_lengths=one, scale=1.0, implementation="mosaic_gpu"
        )
