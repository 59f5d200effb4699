"""Sizes of `prefill_attention`: chunks of 64 queries over pages of all levels."""

from kvcompress_jax.kernels.decode_attention.cases import make_case

# page size, dim, refined slots, query heads of a KV head, dtype, options
SIZES: tuple[tuple[int, int, int, int, str, str], ...] = ((64, 128, 32, 4, "bfloat16", ""),)
QUERIES = 64

CASES = [make_case(*size, queries=QUERIES, op="prefill_attention") for size in SIZES]
