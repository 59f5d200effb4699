"""turboquantcpu (PyPI): TurboQuant with C kernels for CPUs."""

from typing import Any

import numpy as np

from .contract import NotAvailableError, Workload


class TurboquantCpu:
    """turboquantcpu: its C kernels on float32 arrays; one cache per sequence and layer.

    Keys by rotation and codebook, values by int8 or int4 groups; attention is its own, which never
    forms all keys at once.
    """

    def __init__(self, bits: int) -> None:
        self.name, self.bits = "turboquantcpu", bits

    def load(self, work: Workload) -> None:
        try:
            from turboquantcpu.kv_cache import LayerCache
            from turboquantcpu.turbo import TurboQuantizer
            from turboquantcpu.value_quant import ValueQuantizer
        except ImportError as e:
            raise NotAvailableError(str(e)) from None
        shape = self._shape = work.shape
        keys, values = (
            np.ascontiguousarray(x.swapaxes(2, 3)) for x in (work.keys, work.values)
        )  # layers, batch, tokens, heads, dim
        self._keys, self._values, self._queries = keys, values, work.queries
        try:
            self._pairs = [
                (
                    TurboQuantizer(
                        shape.head_dim, shape.kv_heads, shape.heads, i, mode="mse", bits=self.bits
                    ),
                    ValueQuantizer(shape.head_dim, shape.kv_heads, mode=f"int{self.bits}"),
                )
                for i in range(shape.layers)
            ]
        except (ValueError, KeyError, TypeError) as e:
            raise NotAvailableError(str(e)) from None
        self._cache = LayerCache

    def compress(self) -> Any:
        code = []
        for (key, value), ks, vs in zip(self._pairs, self._keys, self._values, strict=True):
            for k, v in zip(ks, vs, strict=True):
                cache = self._cache(key, value, self._shape.tokens)
                cache.update(k, v)
                code.append(cache)
        return code

    def decompress(self, code: Any) -> Any:
        return [(self._keys_of(c), c.val_q.decompress(c._val_state)) for c in code]

    def _keys_of(self, cache: Any) -> np.ndarray:
        state, heads = cache._key_state, range(self._shape.kv_heads)
        norms = state.norms.astype(np.float32)
        return np.stack(
            [
                cache.key_q._mse_reconstruct_head(
                    state.indices[:, h], norms[:, h], h, state.outlier_mask
                )
                for h in heads
            ],
            axis=1,
        )

    def attend(self, code: Any) -> Any:
        queries = self._queries.reshape(-1, 1, *self._queries.shape[2:])
        return [c.compute_attention(q)[0] for c, q in zip(code, queries, strict=True)]

    def opened(self, result: Any) -> tuple[np.ndarray, np.ndarray]:
        keys, values = (
            np.stack([pair[i] for pair in result]).reshape(self._keys.shape).swapaxes(2, 3)
            for i in (0, 1)
        )
        return keys, values

    def attended(self, result: Any) -> np.ndarray:
        return np.stack(result).reshape(self._queries.shape)

    def code_bytes(self, code: Any) -> int:
        return sum(c.memory_bytes() for c in code)
