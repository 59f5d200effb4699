"""Level 3: a code whose basis and bits were fitted to one model, for 4.5 bits and below."""

from kvcompress_jax.calibrated.code import CalibratedCode, decode_rows, encode_rows
from kvcompress_jax.calibrated.row import RowLayout

__all__ = ["CalibratedCode", "RowLayout", "decode_rows", "encode_rows"]
