"""All cases of all ops, and which of them a target is known to refuse."""

import dataclasses
import importlib
import importlib.util
import pkgutil
from collections.abc import Collection, Mapping

import kvcompress_jax.kernels
from kvcompress_jax.kernels.case import Case
from kvcompress_jax.kernels.decode_attention.cases import MOSAIC_CASES, make_case
from kvcompress_jax.kernels.prefill_attention.cases import QUERIES
from kvcompress_jax.kernels.tuning import HERE, read_tuning

# "case" or "case on architecture": words of the reason.
REFUSALS: Mapping[str, str] = {
    f"{case.name} on sm_80": "device: expected sm_90 or newer, got sm_80" for case in MOSAIC_CASES
}

# Bytes that spill with all settings that were tried: on sm_80, in at most four instructions.
SPILLS: Mapping[str, int] = {
    "prefill_attention/256x256/128/256/bfloat16": 16,
    "prefill_attention/256x256/128/256/bfloat16/even": 16,
    "decode_attention/256x256/128/4/bfloat16/even": 8,
}


def refusals_of(places: Collection[tuple[str, str]]) -> dict[str, str]:
    """Those of `REFUSALS` that these cases on these architectures may show."""
    keys = {case for case, _ in places} | {f"{case} on {sm}" for case, sm in places}
    return {key: words for key, words in REFUSALS.items() if key in keys}


def all_cases() -> list[Case]:
    """Of every folder of kernels that has a `cases` module, by name."""
    found: list[Case] = []
    for module in pkgutil.iter_modules(kvcompress_jax.kernels.__path__):
        name = f"{kvcompress_jax.kernels.__name__}.{module.name}.cases"
        if module.ispkg and importlib.util.find_spec(name):  # `native` has none
            found += importlib.import_module(name).CASES
    return sorted(found, key=lambda case: case.name)


def gate_cases() -> list[Case]:
    """`all_cases`, and attention in every size that there are default settings for: a tile of few
    queries, one of many, and a chunk of a prompt; pages refined in part, and evenly."""
    found = {case.name: case for case in all_cases()}
    for op, group, queries in (
        ("decode_attention", 4, 1),
        ("decode_attention", 16, 1),
        ("prefill_attention", 4, QUERIES),
    ):
        for shape in read_tuning(HERE / op / "tuned" / "default.json"):
            page_size, dim = map(int, shape.split("x"))
            # A wide tile of decode differs in its columns alone, not in how pages are read.
            for options in ("",) if group == 16 else ("", "even"):
                sizes = (page_size, dim, page_size // 2, group, "bfloat16", options)
                case = make_case(*sizes, queries=queries, op=op)
                case = dataclasses.replace(case, most_spilled=SPILLS.get(case.name, 0))
                found.setdefault(case.name, case)
    return sorted(found.values(), key=lambda case: case.name)
