"""What attention computes with the keys and values of a block of pages, either way.

Over the tokens of all pages at once, XLA first moves every key and every value to where its page
comes after its head. For many queries that is nothing beside the products; for the few of a decode
step it is half of the time on CPUs, and page by page nothing is moved.
"""

import dataclasses
import functools
from typing import Protocol

import jax
import jax.numpy as jnp
from jax import lax

# Queries times query heads of a KV head up to which page by page is faster on a CPU: with 32 it
# takes a fifth longer, with 500 three times as long.
FEW_QUERIES = 8

_einsum = functools.partial(
    jnp.einsum, precision=lax.Precision.HIGHEST, preferred_element_type=jnp.float32
)


class KeyValueBlock(Protocol):
    """Keys and values of some pages of each sequence."""

    def logits(self, q: jax.Array) -> jax.Array:
        """Queries times keys.

        Args:
          q: f32[sequences, heads, n, dim].

        Returns:
          f32[sequences, heads, n, pages, tokens].
        """

    def weighted_sum(self, weights: jax.Array) -> jax.Array:
        """Values times weights, summed over tokens.

        Args:
          weights: f32[sequences, heads, n, pages, tokens].

        Returns:
          f32[sequences, heads, n, dim].
        """


@dataclasses.dataclass(frozen=True)
class AllPages:
    """For many queries."""

    keys: jax.Array  # f32[sequences, pages, heads, tokens, dim]
    values: jax.Array  # like keys

    def logits(self, q: jax.Array) -> jax.Array:
        return _einsum("shnd,sphtd->shnpt", q, self.keys)

    def weighted_sum(self, weights: jax.Array) -> jax.Array:
        return _einsum("shnpt,sphtd->shnd", weights, self.values)


@dataclasses.dataclass(frozen=True)
class PageByPage:
    """For few queries; keys and values may be in parts of the channels."""

    keys: tuple[jax.Array, ...]  # f32[sequences, pages, heads, tokens, channels]
    values: tuple[jax.Array, ...]  # like keys
    turned: bool = False  # values are f32[sequences, pages, heads, channels, tokens]

    def logits(self, q: jax.Array) -> jax.Array:
        sequences, pages = self.keys[0].shape[:2]
        q = jnp.broadcast_to(q[:, None], (sequences, pages, *q.shape[1:]))
        product = functools.partial(_einsum, "sphnd,sphtd->sphnt")
        parts = jnp.split(q, len(self.keys), axis=-1)
        logits = functools.reduce(jnp.add, map(product, parts, self.keys))
        return logits.transpose(0, 2, 3, 1, 4)

    def weighted_sum(self, weights: jax.Array) -> jax.Array:
        weights = weights.transpose(0, 3, 1, 2, 4)
        axes = "dt" if self.turned else "td"
        product = functools.partial(_einsum, f"sphnt,sph{axes}->sphnd", weights)
        return _sum_pages(jnp.concatenate([product(x) for x in self.values], axis=-1))


def _sum_pages(x: jax.Array) -> jax.Array:
    """Sum over axis 1, by halves: in which order XLA sums depends on how many heads there are, and
    shards of any number of heads are to get the same bits."""
    pages = x.shape[1]
    more = (1 << (pages - 1).bit_length()) - pages
    x = jnp.pad(x, ((0, 0), (0, more)) + ((0, 0),) * (x.ndim - 2))
    while x.shape[1] > 1:
        x = functools.reduce(jnp.add, jnp.split(x, 2, axis=1))
    return x[:, 0]


def goes_page_by_page(queries: int) -> bool:
    """Whether so many queries times query heads of a KV head are multiplied so. Other devices than
    CPUs move numbers fast, and have not been measured."""
    return queries <= FEW_QUERIES and jax.default_backend() == "cpu"


def block_of(keys: jax.Array, values: jax.Array, *, queries: int) -> KeyValueBlock:
    """Keys and values, f32[sequences, pages, heads, tokens, dim], for so many queries times query
    heads of a KV head."""
    if goes_page_by_page(queries):
        return PageByPage((keys,), (values,))
    return AllPages(keys, values)
