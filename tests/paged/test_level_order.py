"""Pages in the order of their levels: the same attention, and no sorting layer by layer."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kvcompress_jax.config import CompressionConfig
from kvcompress_jax.lab.attention_timing import attention_step
from kvcompress_jax.paged import level_order, order_by_level
from tests.kernels.test_attention import INTERPRETED, run
from tests.paged.batch import make_batch

LENGTHS = [5, 16 * 9 - 3, 16 * 6]


@pytest.fixture(scope="module")
def batch():
    """Pages of levels 1 and 2; in the first layer, a floor, all of them are refined."""
    config = CompressionConfig(page_size=16, window_tokens=16, ratio=0.5, floor_layers=(0,))
    return make_batch(config, LENGTHS, layers=3, dtype="bfloat16")


@pytest.fixture
def there_are_kernels(monkeypatch):
    monkeypatch.setattr(level_order, "on_gpu", lambda: True)


def pages(table):
    """Id and index of the sealed pages of each sequence."""
    return [
        list(zip(np.array(ids)[:count].tolist(), np.array(index)[:count].tolist(), strict=True))
        for ids, index, count in zip(
            table.sealed, table.sealed_index, table.sealed_count, strict=True
        )
    ]


def in_order(cache, table):
    """Whether those with chunks come first in all layers."""
    fine = np.array(cache.fine_of) >= 0
    return all(
        np.all(np.diff(fine[:, [page for page, _ in row]].astype(int)) <= 0)
        for row in pages(table)
        if row
    )


def test_pages_with_chunks_come_first(batch, there_are_kernels):
    table = batch.table()
    ordered = jax.jit(order_by_level)(batch.cache, table)
    assert ordered.by_level
    assert in_order(batch.cache, ordered)
    assert not in_order(batch.cache, table)  # the judge can say no
    for got, given in zip(pages(ordered), pages(table), strict=True):
        assert sorted(got) == sorted(given)
        for level in (True, False):  # pages of a level keep their order
            of_level = [x for x in given if (batch.cache.fine_of[1, x[0]] >= 0) == level]
            assert [x for x in got if x in of_level] == of_level
    assert np.array_equal(ordered.sealed_count, table.sealed_count)
    assert np.array_equal(ordered.raw, table.raw)


def attend(batch, table, layer):
    q = jax.random.normal(jax.random.key(1), (3, 1, 8, 64), jnp.bfloat16)
    return run(batch, q, [1] * 3, 0.03, kernel=INTERPRETED, table=table, layer=layer)


def by_page(table, mass):
    return {
        page: np.array(mass[row, :, column])
        for row, found in enumerate(pages(table))
        for column, (page, _) in enumerate(found)
    }


@pytest.mark.parametrize("layer", [0, 1])
def test_attention_is_the_same(batch, there_are_kernels, layer):
    """To the bit in layers without a floor, where sorting gives the same order; `attention_triton`
    itself is judged against float64 elsewhere."""
    table = batch.table()
    ordered = order_by_level(batch.cache, table)
    want, want_lse, want_mass = attend(batch, table, layer)
    got, got_lse, got_mass = attend(batch, ordered, layer)
    atol = 0 if layer else 2.0**-8 * float(jnp.max(jnp.abs(want)))
    np.testing.assert_allclose(*(np.array(x, np.float32) for x in (got, want)), rtol=0, atol=atol)
    np.testing.assert_allclose(got_lse, want_lse, rtol=0, atol=1e-5)
    got_mass, want_mass = by_page(ordered, got_mass.sealed), by_page(table, want_mass.sealed)
    assert got_mass.keys() == want_mass.keys()
    for page, mass in want_mass.items():
        np.testing.assert_allclose(got_mass[page], mass, rtol=0, atol=1e-5)


def test_a_table_that_is_not_in_order_is_read_without_fine_planes(batch):
    """Nothing is read that is not there: chunk -1 of a page without one."""
    table = batch.table()
    wrong, _, _ = attend(batch, dataclasses.replace(table, by_level=True), 1)
    right, _, _ = attend(batch, table, 1)
    assert np.isfinite(np.array(wrong, np.float32)).all()
    difference = np.abs(np.array(wrong, np.float32) - np.array(right, np.float32))
    assert difference.max() > 2.0**-8 * float(jnp.max(jnp.abs(right)))
    assert difference.max() < 0.5 * float(jnp.max(jnp.abs(right)))  # 4 bits, and no nonsense


def sorts(jaxpr, *, inside=False):
    """Sorts of a program, and those of its loops."""
    all_of, of_loops = 0, 0
    for equation in jaxpr.eqns:
        all_of += equation.primitive.name == "sort"
        of_loops += inside and equation.primitive.name == "sort"
        loop = inside or equation.primitive.name in ("while", "scan")
        for part in jax.tree.leaves(
            list(equation.params.values()), is_leaf=lambda x: hasattr(x, "eqns")
        ):
            part = getattr(part, "jaxpr", part)
            if hasattr(part, "eqns"):
                a, b = sorts(part, inside=loop)
                all_of, of_loops = all_of + a, of_loops + b
    return all_of, of_loops


def test_no_layer_sorts(batch, monkeypatch):
    """As it is traced where there is a GPU."""
    q = jax.ShapeDtypeStruct((3, 1, 8, 64), jnp.bfloat16)

    def program():
        return jax.make_jaxpr(attention_step())(q, batch.cache, batch.table()).jaxpr

    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert sorts(program()) == (1, 0)
    monkeypatch.setattr(
        "kvcompress_jax.lab.attention_timing.order_by_level", lambda _, table: table
    )
    assert sorts(program()) == (1, 1)  # the judge can say no


def test_where_nobody_sorts_the_table_stays(batch):
    table = batch.table()
    assert order_by_level(batch.cache, table) is table
