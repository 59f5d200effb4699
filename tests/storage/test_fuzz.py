"""A run of `tests/storage/fuzz.py`, small enough for every day, and that it can fail."""

import functools

import numpy as np
import pytest

from kvcompress_jax.storage.errors import PageFileError
from kvcompress_jax.storage.page_file import decode_page
from tests.storage import fuzz


def test_no_damaged_file_gets_through():
    outcomes = fuzz.run(5_000, seed=20)
    assert outcomes.total() == 5_000
    for what in ("corrupted", "foreign", "truncated", "version"):
        assert outcomes[f"damaged: {what}"] > 50
    # Forgery was deep enough: some files are right by accident, most are not.
    assert 25 < outcomes["forged: accepted"] < outcomes["forged: corrupted"]


def credulous(data):
    """Overlooks one damage in a hundred."""
    try:
        return decode_page(data)
    except PageFileError:
        if sum(data) % 100:
            raise
        return decode_page(fuzz.originals()[0])


def crashes(data):
    return decode_page(data) if data[:2] == b"\x89K" else data[100]


def greedy(data):
    np.zeros(10**8, np.uint8)
    return decode_page(data)


@pytest.mark.parametrize("read", [credulous, crashes, greedy], ids=lambda f: f.__name__)
def test_a_reader_that_is_not_careful_is_found_out(read):
    with pytest.raises((AssertionError, IndexError)):
        fuzz.run(2000, seed=0, read=functools.partial(read))
