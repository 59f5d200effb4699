"""Hadamard matrices."""

import numpy as np

PALEY_PRIMES = (11, 19)  # orders 12 and 20


def hadamard_matrix(n: int) -> np.ndarray:
    """An orthonormal Hadamard matrix: every entry is +-n ** -0.5.

    Powers of two are Sylvester's; 12 and 20 times a power of two take Paley's first construction
    for the odd part, so that 96 = 3 * 32 has a true Hadamard matrix too (12 * 8).

    Args:
      n: 2 ** k, 12 * 2 ** k or 20 * 2 ** k.

    Returns:
      f64[n, n].

    Raises:
      ValueError: another n.
    """
    for odd in (1, *(p + 1 for p in PALEY_PRIMES)):
        power, rest = divmod(n, odd)
        if rest == 0 and power > 0 and power & (power - 1) == 0:
            signs = np.ones((1, 1)) if odd == 1 else _paley(odd - 1)
            for _ in range(power.bit_length() - 1):
                signs = np.kron(np.array([[1, 1], [1, -1]]), signs)
            return signs / np.sqrt(n)
    raise ValueError(f"n: expected 2**k, 12 * 2**k or 20 * 2**k, got {n}")


def _paley(q: int) -> np.ndarray:
    """Order q + 1, for a prime q that is 3 modulo 4 (Paley, 1933)."""
    squares = {i * i % q for i in range(1, q)}
    character = np.array([0] + [1 if i in squares else -1 for i in range(1, q)])
    index = np.arange(q)
    skew = np.zeros((q + 1, q + 1))
    skew[0, 1:], skew[1:, 0] = 1, -1
    skew[1:, 1:] = character[(index[:, None] - index[None, :]) % q]
    return skew + np.eye(q + 1)
