"""The paged cache: pools of pages as a pytree, and pure functions on it.

The way of a token: `append` writes it raw, `attend` reads it, `observe` notes the attention it
gets, `seal` codes its page, `demote` and `promote` take the page's fine plane away and bring it
back. Which page is whose is decided on the host (`kvcompress_jax.manager`).
"""

from kvcompress_jax.paged.append import append
from kvcompress_jax.paged.attention import AttentionMass, attend
from kvcompress_jax.paged.cache import PagedCache, init_cache
from kvcompress_jax.paged.layout import CacheLayout, PoolSizes
from kvcompress_jax.paged.level_order import order_by_level
from kvcompress_jax.paged.observe import cool, observe
from kvcompress_jax.paged.page_code import PageCode, encode_page
from kvcompress_jax.paged.plan import (
    FineUpload,
    Plan,
    RawCopy,
    Retabling,
    apply_plan,
    copy_raw,
    demote,
    evict,
    promote,
)
from kvcompress_jax.paged.read import decode_pages, read_pages
from kvcompress_jax.paged.seal import Sealing, seal
from kvcompress_jax.paged.table import PageTable
from kvcompress_jax.paged.transfer import (
    PageIds,
    RawImage,
    SealedImage,
    export_pages,
    import_pages,
)

__all__ = [
    "AttentionMass",
    "CacheLayout",
    "FineUpload",
    "PageCode",
    "PageIds",
    "PageTable",
    "PagedCache",
    "Plan",
    "PoolSizes",
    "RawCopy",
    "RawImage",
    "Retabling",
    "SealedImage",
    "Sealing",
    "append",
    "apply_plan",
    "attend",
    "cool",
    "copy_raw",
    "decode_pages",
    "demote",
    "encode_page",
    "evict",
    "export_pages",
    "import_pages",
    "init_cache",
    "observe",
    "order_by_level",
    "promote",
    "read_pages",
    "seal",
]
