import pytest

from kvcompress_jax.models.load import Model, load_model
from tests.models.smollm2 import smollm2_file


@pytest.fixture(scope="session")
def smollm2() -> Model:
    """The real model, loaded once."""
    smollm2_file()
    return load_model("smollm2")
