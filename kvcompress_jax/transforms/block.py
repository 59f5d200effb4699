"""The specification's `compress_kv_block`, on top of the embedded code.

    level 0   the block itself
    level 1   base plane, and the fine plane for the `ratio` most important tokens of each head
    level 2   base plane

Nobody is dropped: the selected tokens have 8 bits, the others 4 (4 bits for all at level 2).
"""

import dataclasses

import jax
import jax.numpy as jnp

from kvcompress_jax.codec import Scale, check_finite, reconstruct, refine
from kvcompress_jax.config import CompressionConfig
from kvcompress_jax.paged.page_code import encode_page
from kvcompress_jax.paged.plane_bytes import unpack_planes


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class CompressedBlock:
    """A block at level 1 or 2. Slot j of head h holds token `order[h, j]`, in every field."""

    base: jax.Array  # u8[2, heads, tokens * dim/2]
    fine: jax.Array  # u8[2, heads, fine_rows * dim/2]; no rows at level 2
    key_scale: Scale  # [heads, dim]
    value_scale: Scale  # [heads, tokens]
    order: jax.Array  # u8[heads, tokens]
    dtype: str = dataclasses.field(metadata={"static": True})  # of the block

    @property
    def nbytes(self) -> int:
        """Bytes stored, scales and order included."""
        return sum(x.nbytes for x in jax.tree.leaves(self))


def compress_kv_block(
    block: jax.Array,
    level: int,
    config: CompressionConfig | None = None,
    *,
    attention: jax.Array | None = None,
    layer: int = 0,
    page: int = 0,
) -> jax.Array | CompressedBlock:
    """Compresses the keys and values of some tokens.

    Args:
      block: bf16, f16 or f32 [2, tokens, heads, dim], keys then values; at most 256 tokens.
      level: 0, 1 or 2.
      config: says which tokens matter and how many; None: the default.
      attention: f32[tokens, heads], mean attention received so far; None: not known, all alike.
      layer: for the message about values that are not finite.
      page: likewise.

    Returns:
      The block itself at level 0, else its code.

    Raises:
      NonFiniteError: a value is not finite; outside `jit` only, where values can be seen.
      ValueError: a shape or level that is not one of the above, a level that `config` lacks, or a
        `config` that names `fine_bits=2`: a block may have any number of tokens.
    """
    config = config or CompressionConfig()
    if block.ndim != 4 or block.shape[0] != 2 or block.shape[3] % 2 or block.shape[1] > 256:
        raise ValueError(f"block: expected [2, at most 256, heads, even], got {list(block.shape)}")
    if level not in range(config.levels):
        raise ValueError(f"level: expected 0 to {config.levels - 1}, got {level}")
    if config.fine_bits == 2:
        raise ValueError("config: expected fine_bits=4 or None for a block, got 2")
    if level == 0:
        return block
    keys, values = block.swapaxes(1, 2)  # [heads, tokens, dim]
    if not isinstance(block, jax.core.Tracer):
        for name, x in (("keys", keys), ("values", values)):
            check_finite(name, x[None], layer=layer, first_page=page)
    heads, tokens, _ = keys.shape
    if attention is None:
        attention = jnp.ones((tokens, heads), jnp.float32)
    code = encode_page(
        keys,
        values,
        attention.T,
        jnp.ones((tokens,), jnp.float32),
        jnp.zeros((tokens,), bool),
        rule=config.importance,
        fine_rows=config.refined_tokens(tokens) if level == 1 else 0,
    )
    return CompressedBlock(
        base=code.base,
        fine=code.fine,
        key_scale=code.key_scale,
        value_scale=code.value_scale,
        order=code.order,
        dtype=block.dtype.name,
    )


def decompress_kv_block(compressed: jax.Array | CompressedBlock) -> jax.Array:
    """The block that a code stands for, in token order and the dtype it had.

    Args:
      compressed: of `compress_kv_block`.

    Returns:
      [2, tokens, heads, dim].
    """
    if not isinstance(compressed, CompressedBlock):
        return compressed
    dim = compressed.key_scale.step.shape[-1]
    base, fine = (jnp.stack(unpack_planes(x, dim)) for x in (compressed.base, compressed.fine))
    position = base.astype(jnp.float32)
    refined, coarse = jnp.split(position, [fine.shape[2]], axis=2)
    position = jnp.concatenate([refined + refine(fine), coarse], axis=2)
    keys = reconstruct(position[0], compressed.key_scale, axis=-2)
    values = reconstruct(position[1], compressed.value_scale, axis=-1)
    slot = jnp.argsort(compressed.order.astype(jnp.int32), axis=-1)[..., None]
    block = jnp.stack([jnp.take_along_axis(x, slot, axis=1) for x in (keys, values)])
    dtype = jnp.dtype(compressed.dtype)
    largest = float(jnp.finfo(dtype).max)  # a step that was rounded up may lead beyond it
    return jnp.clip(block, -largest, largest).astype(dtype).swapaxes(1, 2)
