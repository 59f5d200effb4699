"""What every file format offers, and the way from there to the weights of a decoder."""

from pathlib import Path
from typing import Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from kvcompress_jax.models.config import DecoderConfig
from kvcompress_jax.models.errors import ModelError
from kvcompress_jax.models.params import (
    DecoderParams,
    LayerParams,
    field_dtype,
    layer_shapes,
    model_shapes,
)
from kvcompress_jax.models.tokenizer import Tokenizer


class Checkpoint(Protocol):
    """An open model file or directory.

    Attributes:
      path: for messages.
      config: of the decoder.
      files: that hold the weights; their bytes are the weights' identity.
      tensor_names: of all weights in the files that belong to a text decoder.
    """

    path: Path
    config: DecoderConfig
    files: tuple[Path, ...]
    tensor_names: frozenset[str]

    def tensor_name(self, field: str, layer: int | None) -> str:
        """Name of a field of `LayerParams`, or of `DecoderParams` where `layer` is None."""
        ...

    def read(self, field: str, layer: int | None) -> np.ndarray:
        """A tensor in the conventions of `LayerParams`, but matrices as [outputs, inputs]."""
        ...

    def tokenizer(self) -> Tokenizer | None:
        """None if the files have none."""
        ...


def read_params(checkpoint: Checkpoint, dtype: DTypeLike) -> DecoderParams:
    """Reads and stacks the weights.

    Args:
      checkpoint: an open model.
      dtype: of everything but the norms.

    Returns:
      The weights on the default device.

    Raises:
      ModelError: a tensor is missing, has the wrong shape, or would be left unused: a model with
        more to it than the configuration says would compute nonsense.
    """
    config = checkpoint.config
    wanted = {checkpoint.tensor_name(field, None) for field in model_shapes(config)}
    for layer in range(config.num_layers):
        names = {checkpoint.tensor_name(field, layer) for field in layer_shapes(config)}
        if missing := sorted(names - checkpoint.tensor_names):
            raise ModelError(f"{checkpoint.path.name}: tensor {missing[0]} is missing")
        wanted |= names
    if missing := sorted(wanted - checkpoint.tensor_names):
        raise ModelError(f"{checkpoint.path.name}: tensor {missing[0]} is missing")
    if unused := sorted(checkpoint.tensor_names - wanted):
        raise ModelError(
            f"{checkpoint.path.name}: tensor {unused[0]} has no place in a {config.architecture} "
            f"decoder with {config.num_layers} layers"
        )
    layers = {
        field: _read_stack(checkpoint, field, shape, dtype)
        for field, shape in layer_shapes(config).items()
    }
    # Tables are looked up by row: they stay [vocab, hidden].
    model = {
        field: jnp.asarray(_read(checkpoint, field, None, shape).astype(field_dtype(field, dtype)))
        for field, shape in model_shapes(config).items()
    }
    return DecoderParams(layers=LayerParams(**layers), **model)


def _read_stack(
    checkpoint: Checkpoint, field: str, shape: tuple[int, ...], dtype: DTypeLike
) -> jax.Array:
    """A field of all layers [layers, *shape]."""
    layers = checkpoint.config.num_layers
    # Files have matrices as [outputs, inputs]; assignment transposes and casts in one pass. Memory
    # is taken after the first read: a corrupt file may ask for any amount.
    first = _read(checkpoint, field, 0, shape[::-1])
    stack = np.empty((layers, *shape), field_dtype(field, dtype))
    stack[0] = first.T
    for layer in range(1, layers):
        stack[layer] = _read(checkpoint, field, layer, shape[::-1]).T
    return jnp.asarray(stack)


def _read(
    checkpoint: Checkpoint, field: str, layer: int | None, shape: tuple[int, ...]
) -> np.ndarray:
    x = checkpoint.read(field, layer)
    if x.shape != shape:
        raise ModelError(
            f"{checkpoint.path.name}: tensor {checkpoint.tensor_name(field, layer)}: "
            f"expected shape {shape}, got {x.shape}"
        )
    return x
