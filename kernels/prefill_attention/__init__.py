"""`prefill_attention`: see `api.py`."""

from kvcompress_jax.kernels.prefill_attention.api import prefill_attention

__all__ = ["prefill_attention"]
