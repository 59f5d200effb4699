"""kvq (PyPI): hqq's quantizer behind a cache of its own."""

from typing import Any

from .contract import NotAvailableError, Workload
from .torch_base import TorchContender


class Kvq(TorchContender):
    """kvq's `KVQ` cache with its hqq quantizer."""

    def __init__(self, bits: int) -> None:
        self.name, self.bits = "kvq", bits

    def load(self, work: Workload) -> None:
        super().load(work)
        try:
            from kvq import KVQ, KVQConfig

            config = KVQConfig(
                nbits=self.bits,
                group_size=64,
                axis=0,
                compute_dtype=self._torch.bfloat16,
                device=self._torch.device("cpu"),
            )
            self._make = lambda: KVQ(config)
            self._make().update(self._keys[0], self._values[0], 0)
        except (ImportError, ValueError, TypeError, AttributeError) as e:
            raise NotAvailableError(" ".join(str(e).split())) from None

    def compress(self) -> Any:
        cache = self._make()
        for i, (keys, values) in enumerate(zip(self._keys, self._values, strict=True)):
            cache.update(keys, values, i)
        pairs = zip(cache._quantized_key_cache, cache._quantized_value_cache, strict=True)
        return [(cache, k, v) for k, v in pairs]

    def _open_layer(self, code: Any) -> tuple[Any, Any]:
        cache, keys, values = code
        return cache._dequantize(keys), cache._dequantize(values)
