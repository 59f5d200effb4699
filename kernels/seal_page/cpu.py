"""`seal_page` on CPUs, in C++."""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from kvcompress_jax.kernels.native import call, kind_of, refuse_shapes
from kvcompress_jax.kernels.pools import CodePools

POOLS = ("base", "fine", "key_step", "key_zero", "value_step", "value_zero", "order")
MOST_RANK = 8  # of error feedback, as `cpu.cc` has room for


def seal_page_cpu(
    raw: jax.Array,
    pools: CodePools,
    *,
    source: jax.Array,
    target: jax.Array,
    chunks: jax.Array,
    count: jax.Array,
    exact: jax.Array,
    worth: jax.Array | None,
    feedback: jax.Array | None = None,
    pairs: int = 4,
) -> tuple[CodePools, jax.Array]:
    """See `kvcompress_jax.kernels.seal_page.seal_page`; `raw` may hold bfloat16 as uint16. Of a
    page that is refused nothing is written.

    Raises:
      NotImplementedError: shapes that the kernel has no loops for, or no compiler.
    """
    refuse_shapes(pools.dim, pools.page_size)
    if feedback is not None and feedback.shape[-2] > MOST_RANK:
        raise NotImplementedError(
            f"feedback: expected a rank of at most {MOST_RANK}, got {feedback.shape[-2]}"
        )
    given = [getattr(pools, name) for name in POOLS]
    none = jnp.zeros((0,) * 6, jnp.float32)
    args = [
        raw,
        source,
        target,
        chunks,
        count,
        exact,
        none if worth is None else worth,
        none if feedback is None else feedback,
    ]
    like = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in given]
    *written, sealed = call(
        Path(__file__).with_name("cpu.cc"),
        "kvcompress_seal",
        [*like, jax.ShapeDtypeStruct(source.shape, jnp.bool)],
        *args,
        *given,
        aliases={len(args) + i: i for i in range(len(given))},
        fine_bits=np.int32(pools.fine_bits),
        kind=np.int32(kind_of(raw.dtype)),
        pairs=np.int32(pairs),
    )
    return dataclasses.replace(pools, **dict(zip(POOLS, written, strict=True))), sealed
