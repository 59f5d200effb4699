"""A page's code as one compiled program, with whatever XLA fuses into it."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kvcompress_jax.codec import decode
from kvcompress_jax.importance import ImportanceRule
from kvcompress_jax.paged.page_code import PageCode, code_page, encode_page, fit_page
from kvcompress_jax.paged.plane_bytes import unpack_planes

PAGES, HEADS, PAGE, DIM, FINE = 6, 2, 32, 64, 16
# Of a base code in steps: a refined token's is half a cell of 16 further off at most.
BOUND = 0.5 + 0.5 / 16 + 2.0**-8


def are_permutations(order) -> bool:
    """Whether every head of every page has each token once."""
    slots = np.broadcast_to(np.arange(PAGE), np.shape(order))
    return bool(np.array_equal(np.sort(np.asarray(order), axis=-1), slots))


@pytest.mark.parametrize("rule", ["output_error", "specification"])
def test_the_order_is_a_permutation_when_all_is_one_program(rule):
    """What a token is worth is computed inside the program, where XLA may compute it again for
    every reader: ranks against different roundings of it would not be a permutation, and tokens
    would be lost."""
    encoder = functools.partial(encode_page, rule=ImportanceRule(magnitude=rule), fine_rows=FINE)

    @jax.jit
    def coded(key: jax.Array) -> tuple[PageCode, jax.Array]:
        k, v, q = jax.random.normal(key, (3, PAGES, HEADS, PAGE, DIM), jnp.float32)
        v = v * jnp.exp(q)  # tokens of all sizes
        mass = jnp.sum(jax.nn.softmax(k @ q.swapaxes(-1, -2), axis=-2), axis=-1)
        seen = jnp.broadcast_to(jnp.arange(PAGE, 0, -1, dtype=jnp.float32)[None], (PAGES, PAGE))
        sinks = jnp.where(jnp.arange(PAGES) == 0, 4, 0)
        exact = jnp.arange(PAGE)[None] < sinks[:, None]
        return jax.vmap(encoder)(k, v, mass, seen, exact), v

    code, values = coded(jax.random.key(0))
    assert are_permutations(code.order)
    assert not are_permutations(np.asarray(code.order) // 2 * 2)
    # Every value is near what stands in its slot, wherever that is.
    stored = jnp.take_along_axis(values, code.order.astype(jnp.int32)[..., None], axis=-2)
    _, position = unpack_planes(code.base, DIM)
    error = jnp.abs(decode(position, code.value_scale, axis=-1) - stored)
    assert jnp.all(error <= BOUND * code.value_scale.step[..., None].astype(jnp.float32))
    assert not jnp.all(
        jnp.abs(decode(position, code.value_scale, axis=-1) - values)
        <= BOUND * code.value_scale.step[..., None].astype(jnp.float32)
    )


def test_encode_is_fit_then_code():
    key = jax.random.key(1)
    k, v = jax.random.normal(key, (2, HEADS, PAGE, DIM), jnp.float32)
    mass = jax.random.uniform(key, (HEADS, PAGE))
    arguments = (k, v, mass, jnp.ones((PAGE,)), None)
    rule = ImportanceRule()
    fit = jax.jit(functools.partial(fit_page, rule=rule, refined=FINE))(*arguments)
    two = jax.jit(functools.partial(code_page, fine_rows=FINE))(k, v, fit)
    one = encode_page(*arguments, rule=rule, fine_rows=FINE)
    assert are_permutations(two.order)
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(two), strict=True):
        np.testing.assert_array_equal(a, b)
    other = encode_page(*arguments, rule=ImportanceRule(magnitude="key_norm"), fine_rows=FINE)
    assert not np.array_equal(other.order, two.order)
