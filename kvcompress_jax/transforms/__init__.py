"""Pure transforms of key and value vectors, to be applied before coding and undone after."""

from kvcompress_jax.transforms.base import Transform, chain, identity
from kvcompress_jax.transforms.block import CompressedBlock, compress_kv_block, decompress_kv_block
from kvcompress_jax.transforms.center import center
from kvcompress_jax.transforms.hadamard import hadamard_matrix, rotate
from kvcompress_jax.transforms.multiscale import (
    MultiScale,
    multi_scale_compose,
    multi_scale_decompose,
)

__all__ = [
    "CompressedBlock",
    "MultiScale",
    "Transform",
    "center",
    "chain",
    "compress_kv_block",
    "decompress_kv_block",
    "hadamard_matrix",
    "identity",
    "multi_scale_compose",
    "multi_scale_decompose",
    "rotate",
]
