"""All cases of all ops, and which of them a target is known to refuse."""

import importlib
import pkgutil
from collections.abc import Mapping

import kvcompress_jax.kernels
from kvcompress_jax.kernels.case import Case

# "case" or "case on architecture": words of the reason.
REFUSALS: Mapping[str, str] = {}


def all_cases() -> list[Case]:
    """Of every folder of kernels that has a `cases` module, by name."""
    found: list[Case] = []
    for module in pkgutil.iter_modules(kvcompress_jax.kernels.__path__):
        if module.ispkg:
            name = f"{kvcompress_jax.kernels.__name__}.{module.name}.cases"
            found += importlib.import_module(name).CASES
    return sorted(found, key=lambda case: case.name)
