"""Both ways to multiply with a block of pages, against float64."""

import jax
import numpy as np
import pytest

from kvcompress_jax.paged.products import FEW_QUERIES, AllPages, PageByPage, block_of

SEQUENCES, PAGES, HEADS, TOKENS, DIM = 2, 3, 2, 16, 8


def numbers(*shape, seed):
    return np.asarray(jax.random.normal(jax.random.key(seed), shape))


@pytest.mark.parametrize("n", [1, FEW_QUERIES, FEW_QUERIES + 1])
@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize("turned", [False, True])
def test_page_by_page_is_all_pages_at_once(n, parts, turned):
    keys, values = (numbers(SEQUENCES, PAGES, HEADS, TOKENS, DIM, seed=i) for i in (0, 1))
    q = numbers(SEQUENCES, HEADS, n, DIM, seed=2)
    weights = numbers(SEQUENCES, HEADS, n, PAGES, TOKENS, seed=3)
    logits = np.einsum("shnd,sphtd->shnpt", np.float64(q), np.float64(keys))
    summed = np.einsum("shnpt,sphtd->shnd", np.float64(weights), np.float64(values))
    tolerance = PAGES * TOKENS * 2.0**-22

    halves = [tuple(np.split(x, parts, axis=-1)) for x in (keys, values)]
    if turned:
        halves[1] = tuple(x.swapaxes(-1, -2) for x in halves[1])
    for block in (AllPages(keys, values), PageByPage(*halves, turned=turned)):
        assert np.abs(block.logits(q) - logits).max() < tolerance
        assert np.abs(block.weighted_sum(weights) - summed).max() < tolerance
    # Another sequence's keys, and another page's values, are not the same.
    wrong = PageByPage((keys[::-1],), (values[:, ::-1],))
    assert np.abs(wrong.logits(q) - logits).max() > 0.1
    assert np.abs(wrong.weighted_sum(weights) - summed).max() > 0.1


def test_few_queries_go_page_by_page():
    x = numbers(SEQUENCES, PAGES, HEADS, TOKENS, DIM, seed=0)
    assert isinstance(block_of(x, x, queries=FEW_QUERIES), PageByPage)
    assert isinstance(block_of(x, x, queries=FEW_QUERIES + 1), AllPages)
