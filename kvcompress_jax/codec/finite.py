"""What cannot be coded: infinities and NaNs have no range."""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax


class NonFiniteError(ValueError):
    """Keys or values hold an infinity or a NaN, and so have no code."""


def all_finite(x: jax.Array) -> jax.Array:
    """bool[]: whether no value of floating [..., n, m] is an infinity or a NaN.

    Their exponent is all ones, and no other's is. XLA finds the greatest integer on CPUs several
    times as fast as it asks every value whether it is finite.
    """
    info = jnp.finfo(x.dtype)
    integer = jnp.dtype(f"uint{info.bits}").type
    exponent = integer(((1 << info.nexp) - 1) << info.nmant)
    found = lax.bitcast_convert_type(x, integer) & exponent
    return jnp.all(jnp.max(found, axis=-2) < exponent)


def check_finite(name: str, pages: jax.Array, *, layer: int, first_page: int = 0) -> None:
    """Raises for the first page and head with a value that is not finite.

    Reads the array on the host, so it is for use outside `jit`; inside, a page that is not
    finite is left at level 0 and counted (see `kvcompress_jax.paged.seal`).

    Args:
      name: "keys" or "values", for the message.
      pages: floating [pages, heads, tokens, dim].
      layer: for the message.
      first_page: number of the first page, for the message.

    Raises:
      NonFiniteError: names layer, head and page and counts the bad values.
    """
    bad = np.asarray(jnp.sum(~jnp.isfinite(pages), axis=(-2, -1)))
    if bad.any():
        page, head = (int(i) for i in np.argwhere(bad)[0])
        raise NonFiniteError(
            f"{name}: expected finite values, got {int(bad[page, head])} that are not"
            f" in layer {layer}, head {head}, page {first_page + page}"
        )
