"""All cases of all ops, and which of them a target is known to refuse."""

import importlib
import pkgutil
from collections.abc import Collection, Mapping

import kvcompress_jax.kernels
from kvcompress_jax.kernels.case import Case
from kvcompress_jax.kernels.decode_attention.cases import MOSAIC_CASES

# "case" or "case on architecture": words of the reason.
REFUSALS: Mapping[str, str] = {
    f"{case.name} on sm_80": "device: expected sm_90 or newer, got sm_80" for case in MOSAIC_CASES
}


def refusals_of(places: Collection[tuple[str, str]]) -> dict[str, str]:
    """Those of `REFUSALS` that these cases on these architectures may show."""
    keys = {case for case, _ in places} | {f"{case} on {sm}" for case, sm in places}
    return {key: words for key, words in REFUSALS.items() if key in keys}


def all_cases() -> list[Case]:
    """Of every folder of kernels that has a `cases` module, by name."""
    found: list[Case] = []
    for module in pkgutil.iter_modules(kvcompress_jax.kernels.__path__):
        if module.ispkg:
            name = f"{kvcompress_jax.kernels.__name__}.{module.name}.cases"
            found += importlib.import_module(name).CASES
    return sorted(found, key=lambda case: case.name)
