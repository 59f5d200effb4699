"""Pages outside memory: `page_file` (one page as a file), `disk_tier` (many of them, below host
memory), `scrub` (is everything right?). Nothing here touches a device.

Needs the extra `storage` (xxhash, zstandard), but only when something of it is used.
"""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from kvcompress_jax.storage.disk_tier import DiskTier
    from kvcompress_jax.storage.errors import DiskTierError, PageFileError
    from kvcompress_jax.storage.page_file import PageRecord, decode_page, encode_page

_HOME = {
    "DiskTier": "disk_tier",
    "DiskTierError": "errors",
    "PageFileError": "errors",
    "PageRecord": "page_file",
    "decode_page": "page_file",
    "encode_page": "page_file",
}

__all__ = [
    "DiskTier",
    "DiskTierError",
    "PageFileError",
    "PageRecord",
    "decode_page",
    "encode_page",
]


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
