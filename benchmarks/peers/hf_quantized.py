"""transformers' QuantizedCache with the hqq and the optimum-quanto backend."""

from typing import Any

from .contract import NotAvailableError, Workload
from .torch_base import TorchContender

GROUP = 64  # the cache's default


class HuggingFace(TorchContender):
    """Compresses by the cache's `update`; opens by its layers' own dequantisation, of which
    `update` makes use in every step of generation."""

    def __init__(self, bits: int, backend: str) -> None:
        self.name, self.bits = f"transformers QuantizedCache, {backend}", bits
        self._backend = backend

    def load(self, work: Workload) -> None:
        super().load(work)
        try:
            from transformers import PretrainedConfig
            from transformers.cache_utils import QuantizedCache

            self._config = PretrainedConfig(num_hidden_layers=work.shape.layers)
            self._make = QuantizedCache
            self._new()
        except (ImportError, ValueError) as e:
            raise NotAvailableError(" ".join(str(e).split())) from None

    def _new(self) -> Any:
        return self._make(self._backend, self._config, nbits=self.bits, q_group_size=GROUP)

    def compress(self) -> Any:
        cache = self._new()
        with self._torch.inference_mode():
            for i, (keys, values) in enumerate(zip(self._keys, self._values, strict=True)):
                cache.update(keys, values, i)
        return cache.layers

    def _open_layer(self, code: Any) -> tuple[Any, Any]:
        return code._dequantize(code._quantized_keys), code._dequantize(code._quantized_values)

    def code_bytes(self, code: Any) -> int:
        return sum(_bytes(x) for c in code for x in (c._quantized_keys, c._quantized_values))


def _bytes(code: Any) -> int:
    """hqq gives a tensor and a dictionary, quanto a tensor of tensors."""
    if isinstance(code, tuple):
        tensors = [code[0], code[1]["scale"], code[1]["zero"]]
    else:
        packed = code._data
        tensors = [getattr(packed, "_data", packed), code._scale, code._shift]
    return sum(x.numel() * x.element_size() for x in tensors)
