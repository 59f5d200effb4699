"""The header of a page file: what it says, and the check that it may be believed.

A header is JSON, so that any tool can show it. A file from anywhere may hold any JSON with a right
checksum; `parse` believes nothing that it has not checked, and what it returns is consistent.
"""

import dataclasses
import json
import math
from collections.abc import Mapping
from typing import Any

import ml_dtypes
import numpy as np

from kvcompress_jax.storage.errors import PageFileError

MAX_HEADER_BYTES = 1 << 16
MAX_PLANES = 64
MAX_KEY_BYTES = 64
MAX_TEXT = 256
MAX_PLANE_BYTES = 1 << 40
# A plane that gets smaller than that is stored as it is: a reader never needs more memory than so
# many times the size of the file.
MAX_EXPANSION = 64
ENCODINGS = ("raw", "zstd")
DIGEST_HEX = 32
DTYPES = {
    name: np.dtype(getattr(ml_dtypes, name, name))
    for name in ("bool", "uint8", "int8", "int32", "uint32", "float16", "bfloat16", "float32")
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class PlaneInfo:
    """One array of a page, as it lies in the file.

    Attributes:
      name: of the plane.
      dtype: one of `DTYPES`.
      shape: of the array.
      encoding: "raw" or "zstd".
      stored_bytes: that it takes in the file.
      digest: xxh3_128 of the stored bytes, in hex.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    encoding: str
    stored_bytes: int
    digest: str

    @property
    def nbytes(self) -> int:
        """Of the array."""
        return math.prod(self.shape) * DTYPES[self.dtype].itemsize


@dataclasses.dataclass(frozen=True, kw_only=True)
class PageHeader:
    """What a page file says about itself; fields as in `PageRecord`."""

    key: bytes
    model: str
    codec: str
    level: int
    tokens_hash: bytes
    session: bytes
    planes: tuple[PlaneInfo, ...]

    @property
    def nbytes(self) -> int:
        """Of all arrays together."""
        return sum(p.nbytes for p in self.planes)

    @property
    def stored_bytes(self) -> int:
        """Of all planes in the file."""
        return sum(p.stored_bytes for p in self.planes)


def serialize(header: PageHeader) -> bytes:
    """JSON in UTF-8."""
    fields = dataclasses.asdict(header)
    for name in ("key", "tokens_hash", "session"):
        fields[name] = fields[name].hex()
    return json.dumps(fields, separators=(",", ":")).encode()


def parse(data: bytes) -> PageHeader:
    """The inverse of `serialize`, for bytes from anywhere.

    Raises:
      PageFileError: anything about it is not as `serialize` writes it.
    """
    try:
        fields = json.loads(data)
    except (ValueError, RecursionError) as e:
        raise PageFileError("corrupted", f"header: expected JSON, got: {_short(e)}") from None
    names = [f.name for f in dataclasses.fields(PageHeader)]
    _same_fields("header", fields, names)
    planes = fields["planes"]
    _check("planes", f"a list of at most {MAX_PLANES}", planes, isinstance(planes, list))
    _check("planes", f"at most {MAX_PLANES}", len(planes), len(planes) <= MAX_PLANES)
    header = PageHeader(
        key=_bytes("key", fields["key"]),
        model=_text("model", fields["model"]),
        codec=_text("codec", fields["codec"]),
        level=_whole("level", fields["level"], most=255),
        tokens_hash=_bytes("tokens_hash", fields["tokens_hash"]),
        session=_bytes("session", fields["session"]),
        planes=tuple(_plane(p) for p in planes),
    )
    _check("key", "at least one byte", header.key, len(header.key) > 0)
    distinct = {p.name for p in header.planes}
    _check("planes", "distinct names", sorted(distinct), len(distinct) == len(header.planes))
    return header


def _plane(fields: object) -> PlaneInfo:
    _same_fields("plane", fields, [f.name for f in dataclasses.fields(PlaneInfo)])
    assert isinstance(fields, dict)
    dtype, encoding, shape = fields["dtype"], fields["encoding"], fields["shape"]
    _check("dtype", f"one of {list(DTYPES)}", dtype, isinstance(dtype, str) and dtype in DTYPES)
    known = isinstance(encoding, str) and encoding in ENCODINGS
    _check("encoding", f"one of {ENCODINGS}", encoding, known)
    _check("shape", "a list of at most 8", shape, isinstance(shape, list) and len(shape) <= 8)
    plane = PlaneInfo(
        name=_text("plane name", fields["name"]),
        dtype=dtype,
        shape=tuple(_whole("shape", n, most=2**31) for n in shape),
        encoding=encoding,
        stored_bytes=_whole("stored_bytes", fields["stored_bytes"], most=2**40),
        digest=_text("digest", fields["digest"]),
    )
    # Without the axes of no length: NumPy counts them so.
    extent = math.prod(max(n, 1) for n in plane.shape) * DTYPES[dtype].itemsize
    _check("shape", f"at most {MAX_PLANE_BYTES} bytes", shape, extent <= MAX_PLANE_BYTES)
    if encoding == "raw":
        fits = plane.nbytes == plane.stored_bytes
        _check(f"{plane.name}: stored_bytes", plane.nbytes, plane.stored_bytes, fits)
    else:
        fits = plane.nbytes <= MAX_EXPANSION * plane.stored_bytes
        _check(f"{plane.name}: bytes", f"at most {MAX_EXPANSION}x its file", plane.nbytes, fits)
    return plane


def _check(name: str, expected: object, got: object, condition: bool) -> None:
    if not condition:
        raise PageFileError("corrupted", f"{name}: expected {expected}, got {_short(got)}")


def _same_fields(what: str, fields: object, names: list[str]) -> None:
    got: object = type(fields).__name__
    if isinstance(fields, Mapping):
        got = sorted(fields)
    _check(what, f"the fields {sorted(names)}", got, got == sorted(names))


def _text(name: str, x: Any) -> str:
    _check(name, f"a text of 1 to {MAX_TEXT} characters", x, isinstance(x, str))
    _check(name, f"1 to {MAX_TEXT} characters", len(x), 0 < len(x) <= MAX_TEXT)
    _check(name, "printable characters", ascii(x), x.isprintable())
    return str(x)


def _whole(name: str, x: Any, *, most: int) -> int:
    whole = isinstance(x, int) and not isinstance(x, bool)
    _check(name, f"a whole number from 0 to {most}", x, whole and 0 <= x <= most)
    return int(x)


def _bytes(name: str, x: Any) -> bytes:
    """Hex, exactly as `bytes.hex` writes it: no other text means the same bytes."""
    try:
        data = bytes.fromhex(x)
    except (TypeError, ValueError):
        data = None
    same = data is not None and data.hex() == x and len(data) <= MAX_KEY_BYTES
    _check(name, f"at most {MAX_KEY_BYTES} bytes in hex", x, same)
    assert data is not None
    return data


def _short(x: object) -> str:
    text = " ".join(str(x).split())
    return text if len(text) <= 80 else text[:77] + "..."
