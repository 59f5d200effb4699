"""`hadamard`: see `api.py`."""

from kvcompress_jax.kernels.hadamard.api import hadamard

__all__ = ["hadamard"]
