"""What an error in a key costs, measured on a text: the metric in which keys are coded.

An error dk in the key of token j changes the attention output of query i, to first order, by
`p_ij * (v_j - o_i) * (q_i . dk)`: p the attention weight, o the output. The squared size of it,
summed over queries and tokens, is `dk' M dk` with

    M = sum_ij  p_ij^2 |v_j - o_i|^2  (R_-j q_i) (R_-j q_i)'

where R_-j turns the query into the frame of the key before RoPE.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import lax

from kvcompress_jax.models.config import DecoderConfig
from kvcompress_jax.models.dense import AttentionInputs
from kvcompress_jax.models.rope import turn_back
from kvcompress_jax.paged.host_arrays import HostArray

QUERIES = 256  # positions times heads of a group, per KV head and sample
KEY_BLOCK = 128


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LayerStatistics:
    """What calibration knows of one layer, from one sample of text."""

    keys: HostArray  # f32[heads, tokens, dim] before RoPE
    values: HostArray  # f32[heads, tokens, dim]
    metric: HostArray  # f32[heads, dim, dim]: M, per token


@functools.partial(jax.jit, static_argnames=("config", "skip"))
def layer_statistics(
    seen: AttentionInputs, layer: jax.Array, frequency: jax.Array, config: DecoderConfig, skip: int
) -> LayerStatistics:
    """Statistics of one layer.

    Args:
      seen: of one sample, batch of 1.
      layer: i32[].
      frequency: f32[dim/2], of this layer.
      config: of the decoder.
      skip: first tokens, which are kept exactly, that do not count.
    """
    q, k, v = (x[layer, 0].astype(jnp.float32) for x in (seen.q, seen.k, seen.v))
    tokens, heads, dim = k.shape
    group = q.shape[1] // heads
    window = jnp.asarray(config.layer_windows, jnp.int32)[layer]
    count = max(1, min(tokens // 2, QUERIES // group))
    # Queries of the second half and a bit: each sees enough keys to be typical.
    sample = jnp.linspace(tokens // 4, tokens - 1, count).astype(jnp.int32)
    position = jnp.arange(tokens, dtype=jnp.int32)
    back = sample[:, None] - position[None, :]
    visible = (back >= 0) & ((window == 0) | (back < window))

    def one_head(head: jax.Array) -> jax.Array:
        queries = lax.dynamic_slice_in_dim(q[sample], head * group, group, 1)  # [n, group, dim]
        keys, values = k[:, head], v[:, head]
        logits = jnp.einsum("ngd,td->ngt", queries, keys) * config.query_scale
        slope = jnp.ones_like(logits)
        if config.soft_cap is not None:
            logits = config.soft_cap * jnp.tanh(logits / config.soft_cap)
            slope = 1 - (logits / config.soft_cap) ** 2
        p = jax.nn.softmax(jnp.where(visible[:, None], logits, -1e30), axis=-1)
        p = jnp.where(visible[:, None], p, 0.0)
        out = jnp.einsum("ngt,td->ngd", p, values)
        far = jnp.sum(values**2, -1).reshape(1, 1, -1) + jnp.sum(out**2, -1)[..., None]
        far = jnp.maximum(far - 2 * jnp.einsum("ngd,td->ngt", out, values), 0.0)
        squared = jnp.where(position.reshape(1, 1, -1) < skip, 0.0, p**2)
        weight = squared * far * (slope * config.query_scale) ** 2
        moment = _turned_moment(queries.reshape(-1, dim), weight.reshape(-1, tokens), frequency)
        return moment / count

    metric = lax.map(one_head, jnp.arange(heads, dtype=jnp.int32))
    before = turn_back(k, frequency)
    return LayerStatistics(
        keys=before.transpose(1, 0, 2)[:, skip:],
        values=v.transpose(1, 0, 2)[:, skip:],
        metric=metric / tokens,
    )


def _turned_moment(queries: jax.Array, weight: jax.Array, frequency: jax.Array) -> jax.Array:
    """f32[dim, dim]: sum over queries i and keys j of weight_ij (R_-j q_i) (R_-j q_i)'."""
    tokens = weight.shape[1]
    blocks = -(-tokens // KEY_BLOCK)
    weight = jnp.pad(weight, ((0, 0), (0, blocks * KEY_BLOCK - tokens)))
    first, second = jnp.split(queries[:, None], 2, axis=-1)

    def body(i: jax.Array, total: jax.Array) -> jax.Array:
        start = i * KEY_BLOCK
        position = start + jnp.arange(KEY_BLOCK, dtype=jnp.int32)
        angle = position.astype(jnp.float32)[:, None] * frequency[None, :]
        cos, sin = jnp.cos(angle)[None], jnp.sin(angle)[None]
        turned = jnp.concatenate([first * cos + second * sin, second * cos - first * sin], -1)
        share = lax.dynamic_slice_in_dim(weight, start, KEY_BLOCK, 1)
        turned = (turned * jnp.sqrt(share)[..., None]).reshape(-1, queries.shape[1])
        return total + jnp.einsum("nd,ne->de", turned, turned)

    dim = queries.shape[1]
    return lax.fori_loop(0, blocks, body, jnp.zeros((dim, dim), jnp.float32))
