"""`decode_attention` and `prefill_attention`, interpreted, against dense float64 attention that
reads the same bytes; NaN in all that must not be read."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kvcompress_jax.config import CompressionConfig
from kvcompress_jax.kernels import dispatch as dispatching
from kvcompress_jax.kernels.decode_attention import decode_attention
from kvcompress_jax.kernels.decode_attention.queries import list_pages
from kvcompress_jax.kernels.decode_attention.reference import attention_reference
from kvcompress_jax.kernels.decode_attention.triton import attention_triton
from kvcompress_jax.kernels.pools import check_addressable
from kvcompress_jax.paged import attend
from kvcompress_jax.paged.attention import AttentionMass
from kvcompress_jax.paged.attention_kernels import kernel_inputs
from tests.paged.batch import make_batch
from tests.paged.test_attention import check_nan, judge

# Weights and folded queries are rounded to float16 (2**-11 each, of logits up to 16 here), raw ones
# and the output to the cache's dtype.
ROUNDING = {"bfloat16": 2.0**-8, "float16": 2.0**-9}
TUNING = {
    "num_warps": 2,
    "num_warps_raw": 2,
    "num_stages": 2,
    "columns": 8,
    "programs": 8,
    "programs_raw": 4,
    "widest": 32,
}
INTERPRETED = functools.partial(attention_triton, tuning=TUNING, interpret=True)
# page size, dim, group, queries, dtype, ratio of refined tokens, options
CASES = {
    "page16": (16, 64, 4, 1, "bfloat16", 0.5, {"fine_bits": 4}),
    "six-bits": (16, 64, 4, 1, "bfloat16", 0.5, {"fine_bits": 2}),
    "some-six-bits": (16, 64, 4, 1, "bfloat16", 0.2, {"fine_bits": 2}),
    "window-cap": (16, 64, 2, 2, "float16", 0.5, {"window": 20, "soft_cap": 2.0, "fine_bits": 2}),
    "all-refined": (32, 96, 7, 1, "float16", 1.0, {}),
    "prefill": (16, 64, 2, 6, "bfloat16", 0.25, {}),
    "one-head": (16, 128, 1, 1, "bfloat16", 0.5, {}),
    "sixteen-heads": (16, 256, 16, 1, "float16", 0.5, {"fine_bits": 2}),
    "float32-queries": (
        *(16, 64, 5, 3, "bfloat16", 0.5),
        {"queries_dtype": "float32", "fine_bits": 4},
    ),
}


def run(batch, q, query_lengths, scale, *, kernel, table=None, layer=1, **options):
    pools, lists = kernel_inputs(batch.cache, table or batch.table())
    options = {"window": None, "soft_cap": None, "return_mass": True} | options

    @jax.jit
    def call(q, pools, layer, lists, lengths):
        return kernel(q, pools, layer, lists, query_lengths=lengths, scale=scale, **options)

    lengths = jnp.asarray(query_lengths, jnp.int32)
    out, lse, mass = call(q, pools, jnp.int32(layer), lists, lengths)
    return out, lse, AttentionMass(*mass)


def check_kernels(case, kernels, *, pages):
    """Judges kernels on two sequences, the longer one of nearly so many pages."""
    page_size, dim, group, queries, dtype, ratio, options = case
    options = dict(options)
    queries_dtype = options.pop("queries_dtype", dtype)
    config = CompressionConfig(
        page_size=page_size,
        window_tokens=page_size,
        ratio=ratio,
        fine_bits=options.pop("fine_bits", None),
    )
    batch = make_batch(config, [5, pages * page_size - 3], head_dim=dim, dtype=dtype)
    q = jax.random.normal(jax.random.key(7), (2, queries, 2 * group, dim), jnp.float32)
    q = q.astype(jnp.dtype(queries_dtype))
    lengths, scale = [1, queries], dim**-0.5 / 4  # the outlier channel makes large logits
    judged = {"layer": 1, "query_lengths": lengths, "scale": scale} | options
    for kernel in kernels:
        result = run(batch, q, lengths, scale, kernel=kernel, **options)
        assert result[0].dtype == q.dtype
        assert judge(batch, q, result, **judged) <= ROUNDING[dtype]
        # Another layer, another scale, or another window is not the same.
        for other in ({"layer": 0}, {"scale": scale * 1.1}, {"window": 7}):
            assert judge(batch, q, result, **(judged | other)) > 2 * ROUNDING[dtype]


SLOW = ("all-refined", "one-head", "sixteen-heads")


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(case, id=name, marks=[pytest.mark.slow] if name in SLOW else [])
        for name, case in CASES.items()
    ],
)
def test_kernel_and_reference(case):
    check_kernels(case, (INTERPRETED, attention_reference), pages=9)


@pytest.mark.parametrize("kernel", [INTERPRETED, attention_reference], ids=["triton", "reference"])
def test_nan_is_handed_on(kernel):
    check_nan(lambda batch, q: run(batch, q, [2, 2], 0.1, kernel=kernel))


def test_what_the_kernels_refuse():
    batch = make_batch(CompressionConfig(page_size=16), [40], dtype="float32")
    pools, lists = kernel_inputs(batch.cache, batch.table())
    q, one = jnp.zeros((1, 1, 2, 64)), jnp.ones((1,), jnp.int32)
    settings = {"query_lengths": one, "scale": 1.0}
    defaults = {"window": None, "soft_cap": None, "return_mass": False, "interpret": True}
    with pytest.raises(NotImplementedError, match="raw: expected bfloat16 or float16, got float32"):
        attention_triton(q, pools, 0, lists, **settings, **defaults)
    with pytest.raises(NotImplementedError, match="triton: expected a CUDA device, got cpu"):
        decode_attention(q, pools, 0, lists, implementation="triton", **settings)
    with pytest.raises(NotImplementedError, match="triton: expected a CUDA device, got cpu"):
        attend(q, batch.cache, 0, batch.table(), implementation="triton")
    with pytest.raises(ValueError, match=r"q: expected \[sequences, queries, multiple of 2, 64\]"):
        decode_attention(q[..., :32], pools, 0, lists, **settings)
    wide = jax.ShapeDtypeStruct((3 << 30,), jnp.uint8)
    with pytest.raises(NotImplementedError, match="base: expected at most 2 GiB or more than 4"):
        check_addressable(base=wide)


def test_no_kernel_gets_an_empty_array():
    """Which Triton's route cannot compile, and interpreting does not show."""
    batch = make_batch(CompressionConfig(page_size=16, window_tokens=0), [64], dtype="bfloat16")
    table = batch.table()
    table = dataclasses.replace(
        table,
        raw=table.raw[:, :0],
        raw_index=table.raw_index[:, :0],
        raw_count=np.zeros_like(table.raw_count),
    )
    pools, lists = kernel_inputs(batch.cache, table)
    listed = list_pages(pools, lists, 1, None, sealed=True, mass=True)
    assert all(x.size for x in listed.arrays.values())
    q = jnp.ones((1, 1, 4, 64), jnp.bfloat16)
    for kernel in (attention_reference, INTERPRETED):
        out, _, mass = run(batch, q, [1], 0.1, kernel=kernel, table=table)
        assert np.isfinite(np.array(out, np.float32)).all()
        assert mass.raw.shape == (1, 2, 0, 16)


def test_a_fallback_is_logged_and_counted(monkeypatch, caplog):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    before = dispatching.FALLBACKS["op", "triton"]

    def refuses():
        raise NotImplementedError("too wide")

    both = {"triton": refuses, "xla": lambda: "slow"}
    assert dispatching.dispatch("op", both, None) == "slow"
    assert dispatching.FALLBACKS["op", "triton"] == before + 1
    assert "op: triton: too wide" in caplog.text
    with pytest.raises(NotImplementedError, match="op: triton: too wide"):
        dispatching.dispatch("op", both, "triton")
    assert dispatching.FALLBACKS["op", "triton"] == before + 1  # a name does not fall back
