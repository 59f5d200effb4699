"""Level 3: a code whose basis and bits were fitted to one model, for 2.5 to 8.5 bits."""

from kvcompress_jax.calibrated.code import CalibratedCode, decode_rows, encode_rows
from kvcompress_jax.calibrated.row import RowLayout

__all__ = ["CalibratedCode", "RowLayout", "decode_rows", "encode_rows"]
