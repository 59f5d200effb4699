"""`seal_page`: full raw pages to the embedded code, in place."""

import jax
import jax.numpy as jnp

from kvcompress_jax.kernels.dispatch import dispatch
from kvcompress_jax.kernels.pools import CodePools
from kvcompress_jax.kernels.seal_page.cpu import seal_page_cpu
from kvcompress_jax.kernels.seal_page.reference import seal_page_reference
from kvcompress_jax.kernels.seal_page.triton import seal_page_triton

IMPLEMENTATIONS = {"triton": seal_page_triton, "cpu": seal_page_cpu, "xla": seal_page_reference}


def seal_page(
    raw: jax.Array,
    pools: CodePools,
    *,
    source: jax.Array,
    target: jax.Array,
    chunks: jax.Array,
    count: jax.Array,
    exact: jax.Array,
    worth: jax.Array | None = None,
    feedback: jax.Array | None = None,
    pairs: int = 4,
    implementation: str | None = None,
) -> tuple[CodePools, jax.Array]:
    """Codes pages of all layers: orders the tokens, quantises keys per channel over the page and
    values per token (KIVI: Liu et al., 2024), packs base and fine planes, writes scales and order.

    Every page is read once. Only the first `count` of the n entries are real, the rest is padding.

    Args:
      raw: bf16, f16 or f32 [layers, raw_pages, 2, heads, page_size, dim]; keys, then values.
      pools: the codes' pools; donate them, they are updated in place.
      source: i32[n], raw pages.
      target: i32[n], pages to write.
      chunks: i32[n, layers], fine chunks to write, -1: no fine plane.
      count: i32[].
      exact: i32[n], so many first tokens of a page, fewer than page_size, do not count in the keys'
        scales: they are kept exactly elsewhere.
      worth: f32[n, layers, heads, page_size], how much each token deserves the first slots: the
        greatest first, of equals the earlier token, NaN last. None: slot j holds token j.
      feedback: f32[n, layers, heads, 2, rank, dim], finite: how errors of the keys' codes, as they
        are stored, are fed back. The channels are coded in blocks of `pairs` columns
        of either half, the last columns first; a channel is rounded to the code nearest to what it
        is less the sum over the rank of `answer` ([..., 1, r, channel]) times the sum of all
        earlier blocks' errors times `carry` ([..., 0, r, channel]). None: all to the nearest.
      pairs: see `feedback`; a power of two that divides dim/2.
      implementation: None chooses; a name never falls back to another.

    Returns:
      The pools, and bool[n]: pages that are sealed. Where an entry is False, because a value is
      infinite or NaN, or because it is padding, what its target holds means nothing; no other
      page and no chunk of another page is touched.

    Raises:
      ValueError: shapes or dtypes that do not belong together, an unknown implementation.
      NotImplementedError: the implementation that was named cannot do this.
    """
    layers, _, _, heads, page_size, dim = _check_raw(raw, pools)
    n = source.shape[0]
    expected: dict[str, tuple[jax.Array, tuple[int, ...], str]] = {
        "source": (source, (n,), "int32"),
        "target": (target, (n,), "int32"),
        "chunks": (chunks, (n, layers), "int32"),
        "count": (count, (), "int32"),
        "exact": (exact, (n,), "int32"),
    }
    if worth is not None:
        expected["worth"] = (worth, (n, layers, heads, page_size), "float32")
    if feedback is not None:
        rank = feedback.shape[-2]
        expected["feedback"] = (feedback, (n, layers, heads, 2, rank, dim), "float32")
        if pairs < 1 or pairs & (pairs - 1) or (dim // 2) % pairs:
            raise ValueError(
                f"pairs: expected a power of two that divides {dim // 2} (dim/2), got {pairs}"
            )
    for name, (x, shape, dtype) in expected.items():
        if x.shape != shape or x.dtype != dtype:
            raise ValueError(f"{name}: expected {dtype}{list(shape)}, got {x.dtype}{list(x.shape)}")
    return dispatch(
        "seal_page",
        IMPLEMENTATIONS,
        implementation,
        raw,
        pools,
        source=source,
        target=target,
        chunks=chunks,
        count=count,
        exact=exact,
        worth=worth,
        feedback=feedback,
        pairs=pairs,
    )


def _check_raw(raw: jax.Array, pools: CodePools) -> tuple[int, ...]:
    layers, _, _, heads, _ = pools.base.shape
    page_size, dim = pools.page_size, pools.dim
    if raw.ndim != 6 or raw.shape[:1] + raw.shape[2:] != (layers, 2, heads, page_size, dim):
        raise ValueError(
            f"raw: expected [{layers}, raw_pages, 2, {heads}, {page_size}, {dim}],"
            f" got {list(raw.shape)}"
        )
    if raw.dtype not in (jnp.bfloat16, jnp.float16, jnp.float32):
        raise ValueError(f"raw: expected bfloat16, float16 or float32, got {raw.dtype}")
    return raw.shape
