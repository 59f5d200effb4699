"""What the columns of a tile are: the query heads of a KV head side by side, query by query."""

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax


@dataclasses.dataclass(frozen=True)
class Columns:
    """i32[columns] each. Columns past the last query stand for the first one again: its result is
    written twice, and nothing needs a mask."""

    column: jax.Array  # of the KV head
    query: jax.Array
    head: jax.Array  # of all query heads

    def at(self, ref: jax.Array, row: jax.Array, channel: jax.Array | None = None) -> jax.Array:
        """Where the numbers of these columns lie, [columns], in [rows, queries, heads]; or with
        channels [width], [columns, width], in [rows, queries, heads, dim]."""
        if channel is None:
            return ref.at[row, self.query, self.head]
        return ref.at[row, *along_channels(channel, self.query, self.head)]


def along_channels(channel: jax.Array, *places: jax.Array) -> tuple[jax.Array, ...]:
    """Indices of columns [columns] and channels [width], the latter last: [columns, width]."""
    shape = (*places[0].shape, *channel.shape)
    columns = (jnp.broadcast_to(x[:, None], shape) for x in places)
    return *columns, jnp.broadcast_to(channel[None, :], shape)


def columns_of(
    first: jax.Array, count: int, kv_head: jax.Array, *, queries: int, group: int
) -> Columns:
    """`count` columns from `first` on of a KV head that `group` query heads share."""
    column = first + lax.iota(jnp.int32, count)
    column = jnp.where(column < queries * group, column, 0)
    return Columns(column, lax.div(column, group), kv_head * group + lax.rem(column, group))
