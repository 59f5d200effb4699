"""The header of a GGUF file: metadata, and where the tensors are.

`gguf.GGUFReader` reads the same, but it believes what a file says of its own sizes, so a damaged
one can make it take all memory, and it needs seconds where this needs a tenth of one.
"""

import dataclasses
import math
import struct
from pathlib import Path
from typing import Any

import numpy as np

from kvcompress_jax.models.errors import ModelError, one_line
from kvcompress_jax.models.optional import optional_import

_VERSIONS = (2, 3)
_MAX_DIMS = 4
_STRING, _ARRAY = 8, 9
_SCALARS = {
    0: "<u1",
    1: "<i1",
    2: "<u2",
    3: "<i2",
    4: "<u4",
    5: "<i4",
    6: "<f4",
    7: "?",
    10: "<u8",
    11: "<i8",
    12: "<f8",
}


@dataclasses.dataclass(frozen=True)
class GgufTensor:
    """A tensor in the file; its data stays on disk until it is used."""

    name: str
    shape: tuple[int, ...]  # as NumPy counts: the fastest axis last
    kind: Any  # gguf.GGMLQuantizationType
    data: np.ndarray  # uint8[*shape[:-1], bytes of a row], mapped


@dataclasses.dataclass(frozen=True)
class GgufHeader:
    """What a file says before its weights."""

    metadata: dict[str, Any]  # numbers, booleans, text, and lists of them
    tensors: dict[str, GgufTensor]


def read_header(path: Path) -> GgufHeader:
    """Reads the header and checks that all tensors are inside the file.

    Args:
      path: of the file.

    Returns:
      Metadata and tensors.

    Raises:
      ModelError: not a GGUF file, or truncated or corrupt.
      OSError: not readable.
    """
    with path.open("rb") as file:
        if file.read(4) != b"GGUF":
            raise ModelError(f"{path.name}: not a GGUF file")
    cursor = _Cursor(np.memmap(path, np.uint8, mode="r"))
    try:
        return _header(cursor)
    except (ValueError, struct.error) as e:
        raise ModelError(f"{path.name}: truncated or corrupt GGUF file ({one_line(e)})") from e


class _Cursor:
    """Reads from the front to the back, never past the end."""

    def __init__(self, data: np.ndarray) -> None:
        self.data = data
        self.position = 4

    def take(self, size: int, what: str) -> memoryview:
        if size > len(self.data) - self.position:
            raise ValueError(f"{what} ends after the file")
        start = self.position
        self.position += size
        return self.data.data[start : self.position]

    def integer(self, size: int, what: str) -> int:
        return int.from_bytes(self.take(size, what), "little")

    def text(self, what: str) -> str:
        return str(self.take(self.integer(8, what), what), "utf-8")

    def value(self, kind: int, what: str) -> Any:
        if kind == _STRING:
            return self.text(what)
        if kind == _ARRAY:
            kind, count = self.integer(4, what), self.integer(8, what)
            if kind == _STRING:
                # Checked first: each takes 8 bytes at least, so no list is longer than the file.
                if 8 * count > len(self.data):
                    raise ValueError(f"{what} ends after the file")
                return [self.text(what) for _ in range(count)]
            return self.numbers(kind, count, what).tolist()
        return self.numbers(kind, 1, what).item()

    def numbers(self, kind: int, count: int, what: str) -> np.ndarray:
        if kind not in _SCALARS:
            raise ValueError(f"{what} has unknown type {kind}")
        dtype = np.dtype(_SCALARS[kind])
        return np.frombuffer(self.take(count * dtype.itemsize, what), dtype)


def _header(cursor: _Cursor) -> GgufHeader:
    version = cursor.integer(4, "the header")
    if version not in _VERSIONS:
        raise ValueError(f"version: expected one of {_VERSIONS}, got {version}")
    tensor_count = cursor.integer(8, "the header")
    metadata: dict[str, Any] = {}
    for _ in range(cursor.integer(8, "the header")):
        key = cursor.text("a metadata key")
        if key in metadata:
            raise ValueError(f"metadata {key} is there twice")
        metadata[key] = cursor.value(cursor.integer(4, key), key)
    infos = [_tensor_info(cursor) for _ in range(tensor_count)]
    alignment = metadata.get("general.alignment", 32)
    if not isinstance(alignment, int) or alignment < 1:
        raise ValueError(f"general.alignment: expected at least 1, got {alignment!r:.40}")
    start = -(-cursor.position // alignment) * alignment
    tensors: dict[str, GgufTensor] = {}
    for name, shape, kind, offset in infos:
        if name in tensors:
            raise ValueError(f"tensor {name} is there twice")
        tensors[name] = _tensor(cursor.data, name, shape, kind, start + offset)
    return GgufHeader(metadata, tensors)


def _tensor_info(cursor: _Cursor) -> tuple[str, tuple[int, ...], int, int]:
    """Name, shape, type and offset."""
    name = cursor.text("a tensor name")
    dims = cursor.integer(4, name)
    if dims > _MAX_DIMS:
        raise ValueError(f"tensor {name}: expected at most {_MAX_DIMS} axes, got {dims}")
    shape = tuple(cursor.integer(8, name) for _ in range(dims))
    return name, shape[::-1], cursor.integer(4, name), cursor.integer(8, name)


def _tensor(
    data: np.ndarray, name: str, shape: tuple[int, ...], kind: int, start: int
) -> GgufTensor:
    constants = optional_import("gguf.constants")
    quantization = constants.GGMLQuantizationType(kind)  # ValueError for unknown types
    block, block_bytes = constants.GGML_QUANT_SIZES[quantization]
    row = shape[-1] if shape else 1
    if row % block:
        raise ValueError(f"tensor {name}: rows of {row} are not whole blocks of {block}")
    bytes_shape = (*shape[:-1], row // block * block_bytes)
    size = math.prod(bytes_shape)
    if start + size > len(data):
        raise ValueError(f"tensor {name} ends after the file")
    return GgufTensor(name, shape, quantization, data[start : start + size].reshape(bytes_shape))
