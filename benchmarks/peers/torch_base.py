"""What contenders in torch share: loading, and attention over opened keys and values."""

from typing import Any

import numpy as np

from .contract import NotAvailableError, Workload


class TorchContender:
    """Layers one after another, as a model calls them; `_compress_layer` and `_open_layer` are the
    peer's own code. Attention opens a layer and runs torch's own attention kernel on it, which is
    what these caches do in generation. The kernel gets the queries of one KV head as rows of one
    matrix, which on CPUs is several times as fast as its `enable_gqa`."""

    name = ""
    bits = 0

    def load(self, work: Workload) -> None:
        try:
            import torch
        except ImportError as e:
            raise NotAvailableError(str(e)) from None
        self._torch = torch
        self._shape = work.shape
        self._keys, self._values, self._queries = (
            [torch.from_numpy(layer).to(torch.bfloat16) for layer in x]
            for x in (work.keys, work.values, work.queries)
        )

    def _compress_layer(self, layer: int, keys: Any, values: Any) -> Any:
        raise NotImplementedError

    def _open_layer(self, code: Any) -> tuple[Any, Any]:
        raise NotImplementedError

    def _attend_layer(self, query: Any, code: Any) -> Any:
        keys, values = (x.to(query.dtype) for x in self._open_layer(code))
        return self._attention(query, keys, values)

    def _attention(self, query: Any, keys: Any, values: Any) -> Any:
        """[batch, heads, dim] to the same: one query each, attending to all tokens."""
        grouped = query.unflatten(1, (keys.shape[1], -1))
        attend = self._torch.nn.functional.scaled_dot_product_attention
        return attend(grouped, keys, values).flatten(1, 2)

    def compress(self) -> Any:
        with self._torch.inference_mode():
            pairs = enumerate(zip(self._keys, self._values, strict=True))
            return [self._compress_layer(i, k, v) for i, (k, v) in pairs]

    def decompress(self, code: Any) -> Any:
        with self._torch.inference_mode():
            return [self._open_layer(layer) for layer in code]

    def attend(self, code: Any) -> Any:
        with self._torch.inference_mode():
            pairs = zip(self._queries, code, strict=True)
            return [self._attend_layer(q, layer) for q, layer in pairs]

    def opened(self, result: Any) -> tuple[np.ndarray, np.ndarray]:
        shape = self._shape
        want = (shape.layers, shape.batch, shape.kv_heads, shape.tokens, shape.head_dim)
        keys, values = (
            np.stack([layer[i].float().numpy() for layer in result]).reshape(want) for i in (0, 1)
        )
        return keys, values

    def attended(self, result: Any) -> np.ndarray:
        return np.stack([x.float().numpy() for x in result])

    def code_bytes(self, code: Any) -> int:
        return tensor_bytes(self._torch, code)


def tensor_bytes(torch: Any, x: Any) -> int:
    """Bytes of all tensors in nested lists, tuples and dictionaries."""
    if isinstance(x, torch.Tensor):
        return x.numel() * x.element_size()
    if isinstance(x, dict):
        return sum(tensor_bytes(torch, v) for v in x.values())
    if isinstance(x, (list, tuple)):
        return sum(tensor_bytes(torch, v) for v in x)
    return 0
