"""What compression costs the attention output, measured while a model generates.

The raw page of a sealed page is freed, so that the error could not be known afterwards. Therefore a
few sealed pages keep a raw copy, their shadow. In sampled steps the step's own queries attend to
these pages once more, raw and coded (`kvcompress_jax.paged.measure`), and what changes in the
output is the error.
"""

import dataclasses

import jax
import jax.numpy as jnp


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ErrorSums:
    """Sums over samples, for each layer: f32[layers] all of them.

    A sample is one query of one query head. Its *output error* is the relative L2 error of its
    attention output, its *lse error* the absolute error of the log-sum-exp of its logits. The
    count is a float too: it is exact to 2**24 and never overflows.
    """

    samples: jax.Array
    output: jax.Array
    output_squares: jax.Array
    output_max: jax.Array
    lse: jax.Array
    lse_max: jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Telemetry:
    """Raw copies of a few sealed pages, and what was measured with them."""

    shadow: jax.Array  # [layers, shadow_pages, 2, heads, page_size, dim] in token order
    sums: ErrorSums


def init_telemetry(shape: tuple[int, ...], dtype: jnp.dtype) -> Telemetry:
    """Nothing measured yet.

    Args:
      shape: of the shadows.
      dtype: of the raw pages.
    """
    # Each its own array: two that share a buffer could not both be donated.
    sums = [jnp.zeros(shape[:1], jnp.float32) for _ in dataclasses.fields(ErrorSums)]
    return Telemetry(shadow=jnp.zeros(shape, dtype), sums=ErrorSums(*sums))


def keep_shadow(telemetry: Telemetry, kv: jax.Array, slot: jax.Array) -> Telemetry:
    """Stores the raw page of a page that is being sealed.

    Args:
      telemetry: to store it in.
      kv: [layers, 2, heads, page_size, dim].
      slot: i32[] shadow to overwrite; -1: none.
    """
    slot = jnp.where(slot < 0, telemetry.shadow.shape[1], slot)
    return dataclasses.replace(telemetry, shadow=telemetry.shadow.at[:, slot].set(kv, mode="drop"))
