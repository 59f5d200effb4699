"""turboquant (PyPI), which looks for the nearest centroid in torch."""

from typing import Any

from .contract import NotAvailableError, Workload
from .nearest_centroid import NearestCentroid


class Turboquant(NearestCentroid):
    """turboquant: `TurboQuantMSE`, the quantizer of its cache. Codes are bytes, not packed."""

    def __init__(self, bits: int) -> None:
        self.name, self.bits = "turboquant", bits

    def load(self, work: Workload) -> None:
        super().load(work)
        try:
            from turboquant.core import TurboQuantMSE

            self._quantizer = TurboQuantMSE(dim=work.shape.head_dim, bits=self.bits, device="cpu")
        except (ImportError, AttributeError) as e:
            raise NotAvailableError(str(e)) from None

    def _compress_layer(self, layer: int, keys: Any, values: Any) -> Any:
        return self._quantizer.quantize(keys), self._quantizer.quantize(values)

    def _open_layer(self, code: Any) -> tuple[Any, Any]:
        keys, values = (self._quantizer.dequantize(*x).to(self._keys[0].dtype) for x in code)
        return keys, values
