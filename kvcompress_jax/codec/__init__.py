"""The embedded code: a 4-bit base plane and a 4-bit fine plane that refines it.

Vectors to planes and back, with nothing about pages or caches: `scale` fits the range of a
group, `planes` codes values against it, `packing` puts two codes in a byte, `finite` finds what
cannot be coded.
"""

from kvcompress_jax.codec.finite import NonFiniteError, check_finite
from kvcompress_jax.codec.packing import pack, unpack
from kvcompress_jax.codec.planes import decode, encode, reconstruct, refine
from kvcompress_jax.codec.scale import Scale, fit_scale

__all__ = [
    "NonFiniteError",
    "Scale",
    "check_finite",
    "decode",
    "encode",
    "fit_scale",
    "pack",
    "reconstruct",
    "refine",
    "unpack",
]
