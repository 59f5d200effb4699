"""The matrix of `hadamard`: Sylvester's for powers of two, Paley's order 12 for 96 and the like."""

import functools

import numpy as np


@functools.cache
def signs(dim: int) -> np.ndarray:
    """A Hadamard matrix, i8[dim, dim] of +-1; the rows' signs of `codec.hadamard_matrix`.

    Raises:
      NotImplementedError: dim is neither 2 ** k nor 12 * 2 ** k.
    """
    matrix = np.ones((1, 1), np.int8)
    if dim % 12 == 0:
        squares = {i * i % 11 for i in range(1, 11)}
        character = np.array([0] + [1 if i in squares else -1 for i in range(1, 11)], np.int8)
        index = np.arange(11)
        matrix = np.zeros((12, 12), np.int8)
        matrix[0, 1:], matrix[1:, 0] = 1, -1
        matrix[1:, 1:] = character[(index[:, None] - index[None, :]) % 11]
        matrix += np.eye(12, dtype=np.int8)
    while matrix.shape[0] < dim:
        matrix = np.kron(np.array([[1, 1], [1, -1]], np.int8), matrix)
    if matrix.shape[0] != dim:
        raise NotImplementedError(f"dim: expected 2**k or 12 * 2**k, got {dim}")
    return matrix
