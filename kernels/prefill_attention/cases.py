"""Sizes of `prefill_attention`: chunks of 64 queries over pages of all levels."""

from kvcompress_jax.kernels.case import MOST_BYTES
from kvcompress_jax.kernels.decode_attention.cases import make_case

# page size, dim, rows of a fine chunk, query heads of a KV head, dtype, options
SIZES: tuple[tuple[int, int, int, int, str, str], ...] = (
    (64, 128, 32, 4, "bfloat16", ""),
    (64, 128, 32, 4, "bfloat16", "mass"),
    (64, 128, 32, 4, "bfloat16", "mass+even"),
)
QUERIES = 64
# A query's weights are known when it has seen all pages. What each page had for each query is
# therefore written, and read once more: 16 queries of decode hardly notice, 256 do.
MOST_MASS_BYTES = 1.25

CASES = [
    make_case(
        *size,
        queries=QUERIES,
        op="prefill_attention",
        most_bytes=MOST_MASS_BYTES if "mass" in size[-1] else MOST_BYTES,
    )
    for size in SIZES
]
