"""Kernels for CPUs, in C++: compiled on the machine that runs them, for its processor.

XLA emits one loop per array on a CPU, moves bytes one by one where they have to be transposed, and
multiplies small matrices on one core. Beside each operation's `cpu.cc` its `cpu.py` says what it
takes.
"""

from kvcompress_jax.kernels.native.library import SWITCH, call, compiler, unavailable
from kvcompress_jax.kernels.native.shapes import kind_of, refuse_shapes

__all__ = ["SWITCH", "call", "compiler", "kind_of", "refuse_shapes", "unavailable"]
