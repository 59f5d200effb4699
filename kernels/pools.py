"""The pools that hold the code of sealed pages, as kernels see them."""

import dataclasses

import jax
import jax.numpy as jnp


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class CodePools:
    """Pages of codes, of all layers; a page's slots are ordered by importance.

    The planes hold, for each head, keys [rows, dim/2] and values transposed [dim/2, rows], where
    rows is page_size or fine_rows; byte j of the channel axis holds channel j in its low nibble
    and channel j + dim/2 in the high one. With two fine bits, a nibble of row i holds those of slot
    i, and above them those of slot fine_rows + i.
    """

    base: jax.Array  # u8[layers, pages, 2, heads, page_size * dim/2]
    fine: jax.Array  # u8[chunks, 2, heads, fine_rows * dim/2]
    key_step: jax.Array  # bf16[layers, pages, heads, dim]
    key_zero: jax.Array  # f16[layers, pages, heads, dim]
    value_step: jax.Array  # bf16[layers, pages, heads, page_size]
    value_zero: jax.Array  # f16[layers, pages, heads, page_size]
    order: jax.Array  # u8[layers, pages, heads, page_size]: the token of each slot
    # 4: the first fine_rows slots are refined; 2: twice as many.
    fine_bits: int = dataclasses.field(default=4, metadata={"static": True})

    @property
    def dim(self) -> int:
        return self.key_step.shape[-1]

    @property
    def page_size(self) -> int:
        return self.order.shape[-1]

    @property
    def fine_rows(self) -> int:
        """Rows of a fine chunk; 0 where there are no chunks."""
        return self.fine.shape[-1] // (self.dim // 2) if self.fine.shape[0] else 0

    @property
    def refined_slots(self) -> int:
        """Slots that a fine chunk refines."""
        return self.fine_rows * 4 // self.fine_bits

    @property
    def cells(self) -> float:
        """Points to a step of codes with a fine part, see `kernels.embedded`; 1 without chunks."""
        return 2.0**self.fine_bits if self.fine_rows else 1.0


def init_pools(
    *,
    layers: int,
    pages: int,
    chunks: int,
    heads: int,
    page_size: int,
    dim: int,
    fine_rows: int,
    fine_bits: int = 4,
) -> CodePools:
    """Pools of zeros."""

    def scale(size: int, dtype: jnp.dtype) -> jax.Array:
        return jnp.zeros((layers, pages, heads, size), dtype)

    return CodePools(
        base=jnp.zeros((layers, pages, 2, heads, page_size * dim // 2), jnp.uint8),
        fine=jnp.zeros((chunks, 2, heads, fine_rows * dim // 2), jnp.uint8),
        key_step=scale(dim, jnp.bfloat16),
        key_zero=scale(dim, jnp.float16),
        value_step=scale(page_size, jnp.bfloat16),
        value_zero=scale(page_size, jnp.float16),
        order=scale(page_size, jnp.uint8),
        fine_bits=fine_bits,
    )


def check_addressable(**arrays: jax.Array | jax.ShapeDtypeStruct) -> None:
    """Refuses arrays in which Pallas on Triton would compute wrong addresses.

    Its offsets are signed 32-bit numbers of elements up to 4 GiB, and 64-bit ones above, so that
    elements past the 2**31st of an array of up to 4 GiB lie at negative offsets.

    Raises:
      NotImplementedError: names the array.
    """
    for name, x in arrays.items():
        size = x.size * x.dtype.itemsize
        if x.size > 2**31 and size <= 2**32:
            raise NotImplementedError(
                f"{name}: expected at most 2 GiB or more than 4 GiB of {x.dtype} for Triton's"
                f" 32-bit offsets, got {size / 2**30:.2f} GiB"
            )
