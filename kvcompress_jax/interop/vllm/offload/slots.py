"""Compressed pages in host memory: slots of one size, in a region that the processes of vLLM's
scheduler and of its worker have in common."""

import dataclasses
import json
import math
import mmap
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import ml_dtypes
import numpy as np

HEADER_BYTES = 1 << 16
ALIGNMENT_BYTES = 64


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plane:
    """An array of a page, of all layers."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * _dtype(self.dtype).itemsize


class Slots:
    """Slots for pages. Each begins with a byte per plane, which says whether the page has it.

    Attributes:
      count: of slots.
      slot_bytes: of each.
      planes: that a page can have, by name.
      about: what the maker said of them.
    """

    def __init__(self, memory: mmap.mmap, count: int, planes: Sequence[Plane], about: str) -> None:
        self.count, self.about = count, about
        self.planes = {p.name: p for p in planes}
        self._offsets, self.slot_bytes = _place(planes)
        self._memory = np.frombuffer(memory, np.uint8, offset=HEADER_BYTES)

    @classmethod
    def create(
        cls, path: Path, *, budget_bytes: int, planes: Sequence[Plane], about: str
    ) -> "Slots":
        """Makes a region under a name that nothing has.

        Args:
          path: of the region, in memory if that is what its file system is.
          budget_bytes: of all slots.
          planes: that a page can have.
          about: any text, for `open`.

        Raises:
          ValueError: the budget is less than a page, or the planes are too many.
          OSError: the region cannot be made.
        """
        _, size = _place(planes)
        count = budget_bytes // size
        if count < 1:
            raise ValueError(f"host memory: expected at least {size} bytes, got {budget_bytes}")
        header = json.dumps(
            {"count": count, "about": about, "planes": [dataclasses.asdict(p) for p in planes]}
        ).encode()
        if len(header) >= HEADER_BYTES:
            raise ValueError(f"header: expected under {HEADER_BYTES} bytes, got {len(header)}")
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            os.ftruncate(handle, HEADER_BYTES + count * size)
            memory = mmap.mmap(handle, 0)
        except BaseException:
            path.unlink()
            raise
        finally:
            os.close(handle)
        memory[: len(header)] = header
        return cls(memory, count, planes, about)

    @classmethod
    def open(cls, path: Path) -> "Slots":
        """Takes part in a region that another made, and takes its name away: it ends with the
        processes that have it.

        Raises:
          OSError: there is none.
        """
        handle = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        try:
            memory = mmap.mmap(handle, 0)
        finally:
            os.close(handle)
        path.unlink()
        header = json.loads(memory[:HEADER_BYTES].rstrip(b"\0"))
        planes = [
            Plane(name=p["name"], dtype=p["dtype"], shape=tuple(p["shape"]))
            for p in header["planes"]
        ]
        return cls(memory, header["count"], planes, header["about"])

    def write(self, slot: int, page: Mapping[str, np.ndarray]) -> int:
        """Puts a page into a slot; returns its bytes.

        Raises:
          ValueError: a plane that a page cannot have, or of another type or shape. The slot then
            holds no page.
        """
        has = self._has(slot)
        has[:] = 0
        for name, array in page.items():
            plane = self.planes.get(name)
            if plane is None:
                raise ValueError(f"page: expected planes {list(self.planes)}, got {name}")
            if (array.dtype.name, array.shape) != (plane.dtype, plane.shape):
                raise ValueError(
                    f"{name}: expected {plane.dtype}{list(plane.shape)}, got"
                    f" {array.dtype.name}{list(array.shape)}"
                )
            self._view(slot, plane)[...] = array
        for i, name in enumerate(self.planes):
            has[i] = name in page
        return sum(array.nbytes for array in page.values())

    def read(self, slot: int) -> dict[str, np.ndarray]:
        """The page in a slot: views, which change when another page gets there."""
        has = self._has(slot)
        return {
            name: self._view(slot, plane)
            for i, (name, plane) in enumerate(self.planes.items())
            if has[i]
        }

    def _has(self, slot: int) -> np.ndarray:
        if not 0 <= slot < self.count:
            raise ValueError(f"slot: expected 0 to {self.count - 1}, got {slot}")
        return self._memory[slot * self.slot_bytes :][: len(self.planes)]

    def _view(self, slot: int, plane: Plane) -> np.ndarray:
        start = slot * self.slot_bytes + self._offsets[plane.name]
        flat = self._memory[start : start + plane.nbytes]
        return flat.view(_dtype(plane.dtype)).reshape(plane.shape)


def _place(planes: Sequence[Plane]) -> tuple[dict[str, int], int]:
    """Where in a slot the planes are, and the size of a slot."""
    offsets, end = {}, len(planes)
    for plane in planes:
        offsets[plane.name] = -(-end // ALIGNMENT_BYTES) * ALIGNMENT_BYTES
        end = offsets[plane.name] + plane.nbytes
    return offsets, -(-end // ALIGNMENT_BYTES) * ALIGNMENT_BYTES


def _dtype(name: str) -> np.dtype:
    return np.dtype(getattr(ml_dtypes, name, name))
