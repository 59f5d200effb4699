"""Transforms as values, and their composition."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

State = Any  # a pytree of arrays; every transform has its own


class Transform(NamedTuple):
    """An invertible map of vectors with a state that is fitted once.

    All three are pure, of static shapes, and work under `jit` and `vmap`; floats come in any
    dtype and leave as float32.
    """

    init: Callable[[jax.Array], State]  # vectors [tokens, heads, dim] to a state
    encode: Callable[[State, jax.Array], jax.Array]  # [tokens, heads, dim] to the same shape
    decode: Callable[[State, jax.Array], jax.Array]  # undoes `encode`


def identity() -> Transform:
    """Changes nothing but the dtype."""
    return Transform(
        init=lambda x: (),
        encode=lambda state, x: x.astype(jnp.float32),
        decode=lambda state, y: y.astype(jnp.float32),
    )


def chain(*transforms: Transform) -> Transform:
    """Applies transforms one after the other; each is fitted to what the ones before it return.

    The state is a tuple of theirs.
    """

    def init(x: jax.Array) -> State:
        states = []
        for transform in transforms:
            states.append(transform.init(x))
            x = transform.encode(states[-1], x)
        return tuple(states)

    def encode(state: State, x: jax.Array) -> jax.Array:
        x = x.astype(jnp.float32)
        for transform, own in zip(transforms, state, strict=True):
            x = transform.encode(own, x)
        return x

    def decode(state: State, y: jax.Array) -> jax.Array:
        y = y.astype(jnp.float32)
        for transform, own in zip(reversed(transforms), reversed(state), strict=True):
            y = transform.decode(own, y)
        return y

    return Transform(init, encode, decode)
