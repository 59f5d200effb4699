"""Arrays that the host makes and the device reads: indices, tables, plans."""

from typing import Any, TypeAlias

# NumPy arrays outside `jit`, so that making them costs no device call, and jax arrays inside. Not a
# union: every function that takes jax arrays takes either, and type checkers would refuse half.
HostArray: TypeAlias = Any
