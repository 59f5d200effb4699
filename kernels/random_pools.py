"""Pools full of random codes, for workloads."""

import dataclasses

import jax
import jax.numpy as jnp

from kvcompress_jax.kernels.pools import CodePools


def fill_random(pools: CodePools, key: jax.Array) -> CodePools:
    """Pools of the same shapes: any codes, scales that are alike, and a place for each token."""
    keys = iter(jax.random.split(key, 7))

    def planes(x: jax.Array) -> jax.Array:
        return jax.random.bits(next(keys), x.shape, jnp.uint8)

    def within(x: jax.Array, low: float, high: float) -> jax.Array:
        return jax.random.uniform(next(keys), x.shape, x.dtype, low, high)

    order = jnp.argsort(jax.random.bits(next(keys), pools.order.shape), axis=-1)
    return dataclasses.replace(
        pools,
        base=planes(pools.base),
        fine=planes(pools.fine),
        key_step=within(pools.key_step, 0.1, 0.3),
        key_zero=within(pools.key_zero, -8.5, -6.5),
        value_step=within(pools.value_step, 0.1, 0.3),
        value_zero=within(pools.value_zero, -8.5, -6.5),
        order=order.astype(jnp.uint8),
    )
