"""Launch settings of kernels: JSON files of an op, by device name, with a default.

A file maps shapes, `page_size x dim` as "64x128", to settings (a flat object of whole numbers).
`default.json` comes with the package and is made from the compiler's resource tables; a file of a
device, such as `nvidia-h100.json`, holds what was measured on it. Measured files are looked for in
the folder that `KVCOMPRESS_TUNED_DIR` names first, then in the user's cache, then in the package.
"""

import functools
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path

import jax

from kvcompress_jax.kernels.dispatch import on_gpu

Tuning = Mapping[str, int]

HERE = Path(__file__).parent


def device_file(device_kind: str) -> str:
    """The file name of a device: "NVIDIA H100 80GB HBM3" to "nvidia-h100-80gb-hbm3.json"."""
    return re.sub(r"[^a-z0-9]+", "-", device_kind.lower()).strip("-") + ".json"


def measured_folder() -> Path:
    """Where measured settings are stored: one folder per op in it."""
    named = os.environ.get("KVCOMPRESS_TUNED_DIR")
    if named:
        return Path(named)
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "kvcompress_jax" / "tuned"


def find_tuning(op: str, shape: str, device_kind: str | None = None) -> Tuning:
    """Settings of an op for a shape.

    Args:
      op: name of the op's folder.
      shape: key in the files.
      device_kind: as JAX names the device; None: the GPU at hand, or the default without one.

    Raises:
      NotImplementedError: no file has the shape.
      ValueError: a file is no JSON object of objects of whole numbers.
    """
    if device_kind is None and on_gpu():
        device_kind = jax.devices()[0].device_kind
    files = [HERE / op / "tuned" / "default.json"]
    if device_kind is not None:
        name = device_file(device_kind)
        files = [measured_folder() / op / name, HERE / op / "tuned" / name, *files]
    for file in files:
        settings = read_tuning(file).get(shape) if file.is_file() else None
        if settings is not None:
            return settings
    known = ", ".join(read_tuning(files[-1]))
    raise NotImplementedError(f"{op}: expected one of the shapes {known}, got {shape}")


def read_tuning(file: Path) -> Mapping[str, Tuning]:
    """A file's settings by shape.

    Raises:
      ValueError: it is no JSON object of objects of whole numbers.
    """
    return _read(file, file.stat().st_mtime_ns)


@functools.lru_cache
def _read(file: Path, modified: int) -> Mapping[str, Tuning]:
    """A file's settings; `modified` makes a changed file a new one."""
    try:
        settings = json.loads(file.read_text())
        valid = all(
            isinstance(value, int) and not isinstance(value, bool)
            for shape in settings.values()
            for value in shape.values()
        )
    except (ValueError, AttributeError):
        valid = False
    if not valid:
        raise ValueError(f"{file}: expected a JSON object of shapes to whole numbers")
    return settings
