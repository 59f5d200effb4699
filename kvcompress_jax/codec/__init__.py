"""The embedded code: a 4-bit base plane and a fine plane of 4 or 2 bits that refines it.

Vectors to planes and back, with nothing about pages or caches: `scale` fits the range of a
group, `planes` codes values against it, `packing` puts two codes in a byte, `finite` finds what
cannot be coded, `rounding` shortens what was decoded.
"""

from kvcompress_jax.codec.finite import NonFiniteError, all_finite, check_finite
from kvcompress_jax.codec.packing import (
    pack,
    pack_high,
    pack_low,
    separate_rows,
    share_rows,
    unpack,
    unpack_both,
    unpack_halves,
)
from kvcompress_jax.codec.planes import (
    CODE_VERSION,
    decode,
    encode,
    encode_bytes,
    reconstruct,
    refine,
    refined_position,
)
from kvcompress_jax.codec.rounding import narrow
from kvcompress_jax.codec.scale import Scale, fit_scale

__all__ = [
    "CODE_VERSION",
    "NonFiniteError",
    "Scale",
    "all_finite",
    "check_finite",
    "decode",
    "encode",
    "encode_bytes",
    "fit_scale",
    "narrow",
    "pack",
    "pack_high",
    "pack_low",
    "reconstruct",
    "refine",
    "refined_position",
    "separate_rows",
    "share_rows",
    "unpack",
    "unpack_both",
    "unpack_halves",
]
