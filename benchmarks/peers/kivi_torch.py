"""KIVI (Liu et al., 2024) in plain torch: no package of it installs on a CPU.

Keys per channel over groups of 64 tokens, values per token, min-max codes of 4 or 8 bits, two
4-bit codes to a byte, scales and low ends in bfloat16. Written for speed: float32 arithmetic in
place, every operation over a whole layer.
"""

import shutil
from typing import Any

from .contract import NotAvailableError, Workload
from .torch_base import TorchContender

GROUP_TOKENS = 64


class Kivi(TorchContender):
    """Plain torch, or the same through `torch.compile`, which fuses it as XLA does ours."""

    def __init__(self, bits: int, *, compiled: bool = False) -> None:
        self.name, self.bits = f"KIVI in {'compiled' if compiled else 'plain'} torch", bits
        self._compiled = compiled

    def load(self, work: Workload) -> None:
        if self.bits not in (4, 8):
            raise NotAvailableError("4 or 8 bits")
        super().load(work)
        if self._compiled:
            if shutil.which("g++") is None:
                raise NotAvailableError("torch.compile needs g++")
            for name in ("_encode_layer", "_open_layer", "_attend_layer"):
                setattr(self, name, self._torch.compile(getattr(self, name), dynamic=False))

    def _compress_layer(self, layer: int, keys: Any, values: Any) -> Any:
        return self._encode_layer(keys, values)

    def _encode_layer(self, keys: Any, values: Any) -> Any:
        grouped = keys.unflatten(2, (-1, GROUP_TOKENS))  # batch, heads, groups, tokens, dim
        return self._encode(grouped, axis=-2), self._encode(values, axis=-1)

    def _open_layer(self, code: Any) -> tuple[Any, Any]:
        keys, values = (self._decode(*x) for x in code)
        return keys.flatten(2, 3), values

    def _encode(self, x: Any, axis: int) -> tuple[Any, Any, Any]:
        low, high = self._torch.aminmax(x, dim=axis, keepdim=True)
        step = ((high.float() - low.float()) / (2**self.bits - 1)).to(x.dtype)
        divisor = self._torch.where(step > 0, step, 1.0).float()
        codes = x.float().sub_(low).div_(divisor).round_().clamp_(0, 2**self.bits - 1)
        codes = codes.to(self._torch.uint8)
        if self.bits == 4:
            first, second = codes.chunk(2, dim=-1)
            codes = second.bitwise_left_shift(4).bitwise_or_(first)
        return codes, step, low

    def _decode(self, codes: Any, step: Any, low: Any) -> Any:
        if self.bits == 4:
            codes = self._torch.cat([codes & 15, codes >> 4], dim=-1)
        return codes.float().mul_(step).add_(low).to(step.dtype)
