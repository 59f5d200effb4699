"""`seal_page`: see `api.py`."""

from kvcompress_jax.kernels.seal_page.api import seal_page

__all__ = ["seal_page"]
