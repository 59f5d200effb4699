"""tqai (PyPI), which looks for the nearest centroid in torch."""

from typing import Any

from .contract import NotAvailableError, Workload
from .nearest_centroid import NearestCentroid


class Tqai(NearestCentroid):
    """tqai: `PolarQuantizer`, the quantizer of its cache. Codes are bytes, not packed."""

    def __init__(self, bits: int) -> None:
        self.name, self.bits = "tqai", bits

    def load(self, work: Workload) -> None:
        super().load(work)
        try:
            from tqai.backend import get_backend
            from tqai.quantizer import PolarQuantizer

            ops = get_backend("torch", "cpu")
            self._quantizer = PolarQuantizer(work.shape.head_dim, self.bits, ops=ops)
        except (ImportError, ValueError, FileNotFoundError) as e:
            raise NotAvailableError(str(e)) from None

    def _compress_layer(self, layer: int, keys: Any, values: Any) -> Any:
        return self._quantizer.quantize(keys.float()), self._quantizer.quantize(values.float())

    def _open_layer(self, code: Any) -> tuple[Any, Any]:
        keys, values = (self._quantizer.dequantize(*x).to(self._keys[0].dtype) for x in code)
        return keys, values
