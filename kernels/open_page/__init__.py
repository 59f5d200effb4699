"""`open_page`: see `api.py`."""

from kvcompress_jax.kernels.open_page.api import open_page

__all__ = ["open_page"]
