"""tiny-turboquant (PyPI): a KIVI cache in torch."""

from typing import Any

from .contract import NotAvailableError, Workload
from .torch_base import TorchContender, tensor_bytes

_PARTS = ("indices", "scales", "zeros")


class TinyTurboquant(TorchContender):
    """tiny-turboquant: `TinyKVLayer`, a KIVI cache, without a recent window."""

    def __init__(self, bits: int) -> None:
        self.name, self.bits = "tiny-turboquant (KIVI)", bits

    def load(self, work: Workload) -> None:
        super().load(work)
        try:
            from tiny_turboquant.cache import TinyKVLayer
        except ImportError as e:
            raise NotAvailableError(str(e)) from None
        self._layer = TinyKVLayer

    def _compress_layer(self, layer: int, keys: Any, values: Any) -> Any:
        code = self._layer(self.bits, self.bits, residual_len=0, block_size=64)
        code.ingest(keys, values)
        return code

    def _open_layer(self, code: Any) -> tuple[Any, Any]:
        return code._materialize_full()

    def code_bytes(self, code: Any) -> int:
        names = [f"_{kv}_{part}" for kv in ("key", "value") for part in _PARTS]
        return sum(tensor_bytes(self._torch, getattr(c, n)) for c in code for n in names)
