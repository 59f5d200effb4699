"""Pages outside memory: the page file, and the disk tier that holds many of them.

Needs the extra `storage` (xxhash, zstandard); nothing here touches a device.
"""

from kvcompress_jax.storage.disk_tier import DiskTier
from kvcompress_jax.storage.errors import DiskTierError, PageFileError
from kvcompress_jax.storage.page_file import PageRecord, decode_page, encode_page, read_header

__all__ = [
    "DiskTier",
    "DiskTierError",
    "PageFileError",
    "PageRecord",
    "decode_page",
    "encode_page",
    "read_header",
]
