"""The weights of a decoder, split over the devices that share its KV heads.

Every matrix of a layer is split by columns, and what the devices computed is gathered: two devices
never add to the same sum, so that answers do not depend on how many there are but for how a device
rounds products of fewer columns. The embedding and the norms are on every device.
"""

import dataclasses
from typing import Any

import jax
from jax.sharding import PartitionSpec

from kvcompress_jax.models.config import DecoderConfig
from kvcompress_jax.models.params import DecoderParams, LayerParams
from kvcompress_jax.paged.sharding import REPLICATED, HeadSharding


def param_specs(sharding: HeadSharding, params: DecoderParams) -> DecoderParams:
    """Where each array of the weights is, as weights of `PartitionSpec`s."""
    specs: DecoderParams = jax.tree.map(lambda _: REPLICATED, params)
    if not sharding.split_weights:
        return specs
    by_columns = PartitionSpec(None, sharding.axis), PartitionSpec(None, None, sharding.axis)
    split: dict[str, Any] = {}
    for name in (field.name for field in dataclasses.fields(LayerParams)):
        weights = getattr(params.layers, name)
        if weights is not None and not name.endswith("norm"):
            split[name] = by_columns[weights.ndim - 2]
    return dataclasses.replace(specs, layers=dataclasses.replace(specs.layers, **split))


def shard_params(
    sharding: HeadSharding, config: DecoderConfig, params: DecoderParams
) -> DecoderParams:
    """Puts the weights on the devices.

    Raises:
      ValueError: something cannot be split evenly.
    """
    sharding.split("num_kv_heads", config.num_kv_heads)
    if sharding.split_weights:
        sharding.split("hidden_size", config.hidden_size)
        sharding.split("intermediate_size", config.intermediate_size)
    return sharding.place(params, param_specs(sharding, params))
