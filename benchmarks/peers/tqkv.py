"""tqkv (PyPI): TurboQuant in torch, with a bisection for the nearest centroid and packed codes."""

from typing import Any

from .contract import NotAvailableError, Workload
from .torch_base import TorchContender


class Tqkv(TorchContender):
    """tqkv: `TurboKVCodec`. Attention as it recommends: the query is rotated, not every key."""

    def __init__(self, bits: int) -> None:
        self.name, self.bits = "tqkv", bits

    def load(self, work: Workload) -> None:
        super().load(work)
        try:
            from tqa.codec import TurboKVCodec
        except ImportError as e:
            raise NotAvailableError(str(e)) from None
        self._codec = TurboKVCodec(work.shape.head_dim, self.bits)

    def _compress_layer(self, layer: int, keys: Any, values: Any) -> Any:
        return self._codec.compress_k(keys), self._codec.compress_v(values)

    def _open_layer(self, code: Any) -> tuple[Any, Any]:
        (keys, key_norms), (values, value_norms) = code
        opened = (
            self._codec.decompress_k(keys, key_norms),
            self._codec.decompress_v(values, value_norms),
        )
        return opened[0].to(self._keys[0].dtype), opened[1].to(self._keys[0].dtype)

    def _attend_layer(self, query: Any, code: Any) -> Any:
        (keys, key_norms), (values, value_norms) = code
        raw = (
            self._codec.decompress_k_raw(keys, key_norms),
            self._codec.decompress_v_raw(values, value_norms),
        )
        keys, values = (x.to(query.dtype) for x in raw)
        out = self._attention(self._codec.rotate_query(query), keys, values)
        return self._codec.unrotate_output(out)
