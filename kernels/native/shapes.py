"""What the loops in C++ are written for."""

import jax.numpy as jnp

MOST_NUMBERS = 256  # tokens of a page, and channels of a head
# `Kind` of vectors.h; a raw pool may hold bfloat16 as integers.
KINDS = {"bfloat16": 0, "uint16": 0, "float16": 1, "float32": 2}


def kind_of(dtype: jnp.dtype) -> int:
    """What `vectors.h` calls numbers of a dtype."""
    return KINDS[jnp.dtype(dtype).name]


def refuse_shapes(dim: int, page_size: int) -> None:
    """Raises NotImplementedError for pages that a whole number of vectors does not fill."""
    if dim % 32 or page_size % 16 or max(dim, page_size) > MOST_NUMBERS:
        raise NotImplementedError(
            "head_dim and page_size: expected multiples of 32 and 16, both at most"
            f" {MOST_NUMBERS}, got {dim} and {page_size}"
        )
