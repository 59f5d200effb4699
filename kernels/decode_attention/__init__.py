"""`decode_attention`: see `api.py`."""

from kvcompress_jax.kernels.decode_attention.api import decode_attention
from kvcompress_jax.kernels.decode_attention.inputs import AttentionPools, PageLists

__all__ = ["AttentionPools", "PageLists", "decode_attention"]
