"""Whether two implementations of an op gave the same, before either is timed."""

import jax
import jax.numpy as jnp
import numpy as np

FLOAT_DIFFERENCE = 2.0**-7  # relative, and of the greatest: one rounding to bfloat16
# GPUs divide less exactly than IEEE demands, so that a value on the border of two cells may fall
# into either; of random values one in some 10,000 lies so near.
CODES_APART = 1e-3


def disagreement(got: object, want: object, *, relative_from: float = 1 / 16) -> str | None:
    """How two pytrees of arrays differ by more than rounding can explain; None: they do not.

    Bytes hold codes: a share of at most `CODES_APART` of them may differ. Other whole numbers and
    truth values must be equal.

    Args:
      got: pytree.
      want: pytree.
      relative_from: floats are compared relative to themselves if they are at least this share of
        the greatest in their array, and relative to that share of it if they are smaller.
    """
    left, right = jax.tree.leaves(got), jax.tree.leaves(want)
    if len(left) != len(right):
        return f"expected {len(right)} arrays, got {len(left)}"
    for i, (a, b) in enumerate(zip(left, right, strict=True)):
        if a.shape != b.shape or a.dtype != b.dtype:
            return f"array {i}: expected {b.dtype}{list(b.shape)}, got {a.dtype}{list(a.shape)}"
        if a.size and (difference := _array_difference(a, b, relative_from)):
            return f"array {i}: {difference}"
    return None


def _array_difference(a: jax.Array, b: jax.Array, relative_from: float) -> str | None:
    if jnp.issubdtype(a.dtype, jnp.floating):
        x, y = np.asarray(a, np.float64), np.asarray(b, np.float64)
        bound = FLOAT_DIFFERENCE * np.maximum(np.abs(y), np.abs(y).max() * relative_from)
        off = ~(np.abs(x - y) <= bound)
        return f"{off.sum()} of {off.size} numbers differ" if off.any() else None
    share = float(np.mean(np.asarray(a) != np.asarray(b)))
    if share > (CODES_APART if a.dtype == jnp.uint8 else 0.0):
        return f"{share:.2%} of the numbers differ"
    return None
