"""Imports of packages that only reading a model needs."""

import importlib
from types import ModuleType

from kvcompress_jax.models.errors import ModelError


def optional_import(name: str) -> ModuleType:
    """Imports a package of the `demo` extra.

    Args:
      name: dotted name of the module.

    Returns:
      The module.

    Raises:
      ModelError: the package is not installed.
    """
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as e:
        package = (e.name or name).partition(".")[0]
        raise ModelError(
            f"package {package} is not installed: pip install 'kvcompress-jax[demo]'"
        ) from e
