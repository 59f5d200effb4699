"""A configuration as the TOML file that `CompressionConfig.from_toml` reads."""

import dataclasses
import json
import os
from pathlib import Path

from kvcompress_jax.config import FILES, CompressionConfig

_DEFAULTS = CompressionConfig()


def as_toml(config: CompressionConfig, *, folder: Path, comment: str = "") -> str:
    """What differs from the defaults, then the tables.

    Args:
      config: to write.
      folder: of the file, which the files that the configuration names are written relative to.
      comment: lines for its head.
    """
    lines = [f"# {line}".rstrip() for line in comment.splitlines()]
    tables: list[str] = []
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if value == getattr(_DEFAULTS, field.name):
            continue
        if dataclasses.is_dataclass(value):
            tables += ["", f"[{field.name}]"]
            tables += [
                f"{f.name} = {_literal(getattr(value, f.name))}"
                for f in dataclasses.fields(value)
                if getattr(value, f.name) is not None
            ]
            continue
        if field.name in FILES:
            value = os.path.relpath(value, folder)
        lines.append(f"{field.name} = {_literal(value)}")
    return "\n".join([*lines, *tables]) + "\n"


def _literal(value: object) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False)
    if isinstance(value, tuple):
        return "[" + ", ".join(_literal(x) for x in value) + "]"
    return repr(value)
