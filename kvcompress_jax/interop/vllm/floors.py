"""Floor layers ask vLLM for more memory than the others.

A backend that says what a token takes is not told which layer asks. The worker is: what it reports
to vLLM has the layers by name, and that is where the floor layers get their own size.
"""

import dataclasses
from typing import Any

from vllm.v1.kv_cache_interface import FullAttentionSpec

from kvcompress_jax.config import CompressionConfig, ConfigError
from kvcompress_jax.interop.vllm import settings
from kvcompress_jax.interop.vllm.backend import dtype_name
from kvcompress_jax.interop.vllm.carve import content_bytes, floors_differ, layer_layout
from kvcompress_jax.interop.vllm.model_files import layer_index
from kvcompress_jax.models.errors import ModelError


class FloorWorker:
    """Mixed into a worker of vLLM."""

    vllm_config: Any

    def get_kv_cache_spec(self) -> dict[str, Any]:
        """See `WorkerBase`.

        Raises:
          ConfigError: the model does not have such floor layers.
        """
        specs: dict[str, Any] = super().get_kv_cache_spec()  # type: ignore[misc]
        return with_floors(specs, dtype=dtype_name(self.vllm_config.model_config.dtype))


def with_floors(specs: dict[str, Any], *, dtype: str) -> dict[str, Any]:
    """What the layers ask for, with more for floor layers.

    Args:
      specs: of all layers of the model, by name, as the backend customised them.
      dtype: of the model.

    Raises:
      ConfigError: the configuration's floor layers are not some of these layers.
    """
    if not specs:
        return specs
    config = settings.read_config(next(iter(specs.values())).block_size)
    fine_share = settings.fine_share(config)
    if not floors_differ(config, fine_share):
        return specs
    spec, *others = set(specs.values())
    if others or type(spec) is not FullAttentionSpec:
        raise ConfigError(f"floor_layers: expected full attention in layers alike, got {specs}")
    layout = layer_layout(config, heads=spec.num_kv_heads, dim=spec.head_size, dtype=dtype)
    content = content_bytes(
        config, layout, raw_share=settings.raw_share(), fine_share=fine_share, floor=True
    )
    larger = dataclasses.replace(spec, state_content_bytes=content)
    return specs | dict.fromkeys(floor_names(config, list(specs)), larger)


def floor_names(config: CompressionConfig, names: list[str]) -> list[str]:
    """The names of the floor layers.

    Args:
      config: says which they are.
      names: of all layers.

    Raises:
      ConfigError: there is no such layer, all of them are floor layers, or vLLM's names do not tell
        them apart.
    """
    layers = len(names)
    try:
        by_index = {layer_index(name): name for name in names}
    except ModelError as e:
        raise ConfigError(f"floor_layers: {e}") from None
    if sorted(by_index) != list(range(layers)):
        raise ConfigError(
            f"floor_layers: expected one cache in each of {layers} layers, got {sorted(names)}"
        )
    wrong = [i for i in config.floor_layers if not -layers <= i < layers]
    if wrong:
        raise ConfigError(f"floor_layers: expected {-layers} to {layers - 1}, got {wrong}")
    floors = sorted(config.floors(layers))
    if len(floors) == layers:
        raise ConfigError(
            f"floor_layers: expected some of {layers} layers inside vLLM, got all of them: use"
            f" seal_level=1 with {settings.FINE_SHARE_VARIABLE}=1"
        )
    return [by_index[i] for i in floors]
