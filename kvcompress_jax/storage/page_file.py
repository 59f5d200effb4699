"""The page file: one page, or some planes of it, as bytes that describe and check themselves.

    0    8   magic
    8    2   version of the format
    10   2   zero
    12   4   bytes of the header
    16   8   bytes of the file
    24   16  xxh3_128 of bytes 0 to 23 and the header
    40       header: JSON (`kvcompress_jax.storage.header`)
             planes, one after the other, each with its xxh3_128 in the header

Little-endian. Every byte is under a checksum, and there is nothing after the last plane. A checksum
of this kind finds accidents, not forgery: who can write into the folder can write pages.
"""

import dataclasses
import math
import struct
from collections.abc import Mapping

import numpy as np
import xxhash
import zstandard

from kvcompress_jax.storage.errors import PageFileError
from kvcompress_jax.storage.header import (
    DTYPES,
    MAX_EXPANSION,
    MAX_HEADER_BYTES,
    MAX_KEY_BYTES,
    MAX_PLANES,
    MAX_TEXT,
    PageHeader,
    PlaneInfo,
    parse,
    serialize,
)

# Like PNG's: not text, and a line ending that a careless copy would change.
MAGIC = b"\x89KVP\r\n\x1a\n"
VERSION = 1
_FIXED = struct.Struct("<8sHHIQ")
PREFIX_BYTES = _FIXED.size + 16


@dataclasses.dataclass(frozen=True, kw_only=True)
class PageRecord:
    """A page outside memory.

    Attributes:
      key: 1 to 64 bytes that name it; what they are made of is the caller's business.
      model: fingerprint of the model whose keys and values these are; not empty.
      codec: fingerprint of the code that the planes are in; not empty.
      level: of the page, 0 to 255.
      tokens_hash: of the page's token ids and everything before them; at most 64 bytes.
      session: at most 64 bytes. Not empty: means nothing to any other session.
      planes: arrays by name, at most 64.
    """

    key: bytes
    model: str
    codec: str
    level: int
    tokens_hash: bytes = b""
    session: bytes = b""
    planes: Mapping[str, np.ndarray]

    def __post_init__(self) -> None:
        _expect("key", f"1 to {MAX_KEY_BYTES} bytes", 0 < len(self.key) <= MAX_KEY_BYTES, self.key)
        for name in ("tokens_hash", "session"):
            x = getattr(self, name)
            _expect(name, f"at most {MAX_KEY_BYTES} bytes", len(x) <= MAX_KEY_BYTES, x)
        names = [("model", self.model), ("codec", self.codec)]
        for what, text in (*names, *(("plane", name) for name in self.planes)):
            fits = 0 < len(text) <= MAX_TEXT and text.isprintable()
            _expect(what, f"1 to {MAX_TEXT} printable characters", fits, text)
        _expect("level", "0 to 255", 0 <= self.level <= 255, self.level)
        count = len(self.planes)
        _expect("planes", f"at most {MAX_PLANES}", count <= MAX_PLANES, count)
        for name, plane in self.planes.items():
            dtype = plane.dtype.name
            _expect(f"plane {name}", f"one of {list(DTYPES)}", dtype in DTYPES, dtype)
            _expect(f"plane {name}", "at most 8 axes", plane.ndim <= 8, plane.shape)

    @property
    def nbytes(self) -> int:
        """Of all planes."""
        return sum(p.nbytes for p in self.planes.values())


def _expect(name: str, expected: str, condition: bool, got: object) -> None:
    if not condition:
        raise ValueError(f"{name}: expected {expected}, got {got!r}")


def encode_page(record: PageRecord, *, compression: int | None = None) -> list[bytes]:
    """A page as the bytes of its file.

    Args:
      record: the page.
      compression: level of zstandard, None: planes as they are. A plane that does not get smaller
        is stored as it is.

    Returns:
      Parts whose concatenation is the file.
    """
    compressor = None
    if compression is not None:
        # Without a checksum of its own: every stored byte is under ours.
        compressor = zstandard.ZstdCompressor(level=compression, write_checksum=False)
    infos, parts = [], []
    for name, plane in record.planes.items():
        stored, encoding = _little_endian(plane).tobytes(), "raw"
        if compressor is not None:
            smaller = compressor.compress(stored)
            if len(smaller) < len(stored) <= MAX_EXPANSION * len(smaller):
                stored, encoding = smaller, "zstd"
        parts.append(stored)
        infos.append(
            PlaneInfo(
                name=name,
                dtype=plane.dtype.name,
                shape=plane.shape,
                encoding=encoding,
                stored_bytes=len(stored),
                digest=xxhash.xxh3_128_hexdigest(stored),
            )
        )
    header = serialize(
        PageHeader(
            key=record.key,
            model=record.model,
            codec=record.codec,
            level=record.level,
            tokens_hash=record.tokens_hash,
            session=record.session,
            planes=tuple(infos),
        )
    )
    if len(header) > MAX_HEADER_BYTES:
        raise ValueError(f"header: expected at most {MAX_HEADER_BYTES} bytes, got {len(header)}")
    total = PREFIX_BYTES + len(header) + sum(len(p) for p in parts)
    fixed = _FIXED.pack(MAGIC, VERSION, 0, len(header), total)
    return [fixed, xxhash.xxh3_128_digest(fixed + header), header, *parts]


def read_header(data: bytes, *, file_bytes: int) -> PageHeader:
    """What a file says about itself, checked; its planes are not looked at.

    Args:
      data: the beginning of the file: `PREFIX_BYTES + MAX_HEADER_BYTES` bytes, or all of it.
      file_bytes: size of the whole file.

    Raises:
      PageFileError: it is not a page file of this version, or its header or size is wrong.
    """
    if data[: len(MAGIC)] != MAGIC[: len(data)] or not data:
        raise PageFileError("foreign", "expected a page file, got something else")
    if len(data) < PREFIX_BYTES:
        raise PageFileError("truncated", f"expected at least {PREFIX_BYTES} bytes, got {len(data)}")
    _, version, zero, header_bytes, total = _FIXED.unpack_from(data)
    if version != VERSION:
        raise PageFileError("version", f"version: expected {VERSION}, got {version}")
    if zero or header_bytes > MAX_HEADER_BYTES:
        raise PageFileError("corrupted", f"header: expected a sane one, got {header_bytes} bytes")
    if len(data) < PREFIX_BYTES + header_bytes:
        raise PageFileError("truncated", f"header: expected {header_bytes} bytes, got fewer")
    header_data = data[PREFIX_BYTES : PREFIX_BYTES + header_bytes]
    digest = xxhash.xxh3_128_digest(data[: _FIXED.size] + header_data)
    if digest != data[_FIXED.size : PREFIX_BYTES]:
        raise PageFileError("corrupted", "header: expected bytes of its checksum, got others")
    if file_bytes < total:
        raise PageFileError("truncated", f"expected {total} bytes, got {file_bytes}")
    header = parse(header_data)
    expected = PREFIX_BYTES + header_bytes + header.stored_bytes
    if not file_bytes == total == expected:
        raise PageFileError("corrupted", f"expected {expected} bytes, got {file_bytes}")
    return header


def decode_page(data: bytes) -> PageRecord:
    """The page of a file's bytes; needs memory of at most `MAX_EXPANSION` times their number.

    Returns:
      The record; its planes are read-only.

    Raises:
      PageFileError: any byte is not as it was written.
    """
    header = read_header(data[: PREFIX_BYTES + MAX_HEADER_BYTES], file_bytes=len(data))
    view = memoryview(data)
    offset = len(data) - header.stored_bytes
    planes = {}
    for info in header.planes:
        stored = view[offset : offset + info.stored_bytes]
        offset += info.stored_bytes
        if xxhash.xxh3_128_hexdigest(stored) != info.digest:
            reason = f"plane {info.name}: expected bytes of its checksum, got others"
            raise PageFileError("corrupted", reason)
        planes[info.name] = _plane(info, stored)
    return PageRecord(
        key=header.key,
        model=header.model,
        codec=header.codec,
        level=header.level,
        tokens_hash=header.tokens_hash,
        session=header.session,
        planes=planes,
    )


def _plane(info: PlaneInfo, stored: memoryview) -> np.ndarray:
    data: bytes | memoryview = stored
    if info.encoding == "zstd":
        data = _decompressed(info, stored)
    array = np.frombuffer(data, DTYPES[info.dtype].newbyteorder("<"))
    if info.dtype == "bool" and np.any(array.view(np.uint8) > 1):
        raise PageFileError("corrupted", f"plane {info.name}: expected booleans")
    return array.astype(DTYPES[info.dtype], copy=False).reshape(info.shape)


def _decompressed(info: PlaneInfo, stored: memoryview) -> bytes:
    try:
        # The frame says how much memory it will need; only the right amount is given to it.
        size = zstandard.frame_content_size(stored)
        if size != info.nbytes or math.prod(info.shape) == 0:
            raise PageFileError("corrupted", f"plane {info.name}: expected {info.nbytes} bytes")
        data = zstandard.ZstdDecompressor().decompress(stored, allow_extra_data=False)
    except zstandard.ZstdError as e:
        raise PageFileError("corrupted", f"plane {info.name}: {e}") from None
    if len(data) != info.nbytes:
        raise PageFileError("corrupted", f"plane {info.name}: expected {info.nbytes} bytes")
    return data


def _little_endian(plane: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(plane.astype(plane.dtype.newbyteorder("<"), copy=False))
