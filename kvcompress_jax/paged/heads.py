"""What one shard of a cache that is split by heads needs to know of the others, and how it computes
the same bits as any other number of shards.

A float sum in another order is another number, and tokens are ordered by such numbers. So what is
of all heads is gathered, never summed shard by shard; and what a head's numbers are summed to is
found head after head (`head_by_head`): how XLA orders the terms of a reduction depends on the shape
of the whole array.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jax import lax

_Tree = TypeVar("_Tree")


@dataclasses.dataclass(frozen=True)
class HeadSplit:
    """Marks a cache as one shard, inside `jax.shard_map`: shard i of n holds the i-th n-th of the
    KV heads. Hashable.

    Attributes:
      axis: of the mesh.
      shards: along it.
    """

    axis: str
    shards: int

    def own(self, x: jax.Array, axis: int) -> jax.Array:
        """This shard's part of an array that every shard has whole."""
        size = x.shape[axis] // self.shards
        return lax.dynamic_slice_in_dim(x, lax.axis_index(self.axis) * size, size, axis)


def gather_heads(split: HeadSplit | None, x: jax.Array, axis: int) -> jax.Array:
    """An array with the heads of all shards along `axis`; x itself where nothing is split."""
    return x if split is None else lax.all_gather(x, split.axis, axis=axis, tiled=True)


def on_all_heads(split: HeadSplit | None, flag: jax.Array) -> jax.Array:
    """bool[...]: whether a flag is true on every shard."""
    if split is None:
        return flag
    return lax.pmin(flag.astype(jnp.int32), split.axis) == 1


def head_by_head(
    split: HeadSplit | None,
    function: Callable[..., _Tree],
    *args: Any,
    axes: Sequence[int | None],
    out_axis: int,
) -> _Tree:
    """`function(*args)`, of one head after the other where heads are split.

    Args:
      split: of the cache.
      function: of pytrees of arrays; what it returns of a head is of that head alone.
      args: its arguments.
      axes: where each argument has its heads, of which there are equally many; None: it has none,
        and is passed as it is.
      out_axis: where each of the results has them.
    """
    if split is None:
        return function(*args)
    sizes = [
        leaf.shape[axis]
        for arg, axis in zip(args, axes, strict=True)
        if axis is not None
        for leaf in jax.tree.leaves(arg)
    ]
    heads = sizes[0]
    if heads == 1:  # or XLA would see that there is nothing to slice, and no need of a loop
        args = tuple(
            arg if axis is None else jax.tree.map(functools.partial(_twice, axis=axis), arg)
            for arg, axis in zip(args, axes, strict=True)
        )

    def one(i: jax.Array) -> _Tree:
        def pick(x: jax.Array, axis: int) -> jax.Array:
            return lax.dynamic_slice_in_dim(x, i, 1, axis)

        return function(
            *(
                arg if axis is None else jax.tree.map(functools.partial(pick, axis=axis), arg)
                for arg, axis in zip(args, axes, strict=True)
            )
        )

    def body(i: jax.Array, out: _Tree) -> _Tree:
        put = lambda o, x: lax.dynamic_update_slice_in_dim(o, x, i, out_axis)  # noqa: E731
        return jax.tree.map(put, out, one(i))

    def room(x: jax.ShapeDtypeStruct) -> jax.Array:
        shape = (*x.shape[:out_axis], max(2, heads), *x.shape[out_axis + 1 :])
        return jnp.zeros(shape, x.dtype)

    out = jax.tree.map(room, jax.eval_shape(one, jax.ShapeDtypeStruct((), jnp.int32)))
    # A count that XLA does not know, or a loop over a single head would be none.
    count = jnp.where(lax.axis_index(split.axis) < 0, 0, heads).astype(jnp.int32)
    out = lax.fori_loop(0, count, body, out)
    return jax.tree.map(lambda x: lax.slice_in_dim(x, 0, heads, axis=out_axis), out)


def _twice(x: jax.Array, axis: int) -> jax.Array:
    return jnp.concatenate([x, x], axis=axis)
