"""The host side: who has which pages, at which level, within a budget in bytes."""

from kvcompress_jax.manager.free_list import NO_SHARES, OutOfPagesError
from kvcompress_jax.manager.kv_manager import KVCacheManager
from kvcompress_jax.manager.pools import divide_budget, pools_for_tokens

__all__ = ["NO_SHARES", "KVCacheManager", "OutOfPagesError", "divide_budget", "pools_for_tokens"]
